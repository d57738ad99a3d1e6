"""From a `DataConfig` to packed rows: finds the files, the tokenizer and the cached pack."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from jaxgen.data import sources
from jaxgen.data.cache import build_once, default_cache_dir
from jaxgen.data.chat import template_of
from jaxgen.data.config import DataConfig
from jaxgen.data.documents import ReadReport, read_conversations, read_documents
from jaxgen.data.pack import encode_conversations, encode_texts, pack_documents
from jaxgen.data.rows import FORMAT, MASKED_FORMAT, Manifest, PackedRows
from jaxgen.data.sources import File, Source
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.progress import progress

T = TypeVar("T")

# BPE is trained on this many characters: 8,192 tokens of Python code take 2 to 4 s on two cores.
_BPE_SAMPLE_CHARS = 10_000_000


@dataclasses.dataclass(frozen=True)
class PackedData:
    """The packed rows of every source, and the tokenizer that made them."""

    config: DataConfig
    seq_len: int
    tokenizer: Tokenizer
    folders: tuple[pathlib.Path, ...]
    manifests: tuple[Manifest, ...]

    @functools.cached_property
    def train(self) -> tuple[PackedRows, ...]:
        """The training rows of each source."""
        return self._split("train")

    @functools.cached_property
    def eval(self) -> tuple[PackedRows, ...]:
        """The held-out rows of each source."""
        return self._split("eval")

    @property
    def eval_bytes_per_token(self) -> float:
        """Bytes of held-out text a token that counts; bits per byte = loss / ln 2 / this."""
        splits = [manifest.eval for manifest in self.manifests]
        targets = sum(split.targets for split in splits)
        return sum(split.text_bytes for split in splits) / max(targets, 1)

    @property
    def fingerprint(self) -> str:
        """A hash that is equal exactly where every batch is: rows, weights, seed and tokenizer."""
        weights = [source.weight for source in self.config.sources]
        digests = [manifest.digest for manifest in self.manifests]
        return _hash([digests, weights, self.config.shuffle_seed, self.tokenizer.fingerprint])

    def _split(self, name: str) -> tuple[PackedRows, ...]:
        pairs = zip(self.folders, self.manifests, strict=True)
        return tuple(PackedRows(folder, manifest, name) for folder, manifest in pairs)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a `DataConfig` names and is there, before anything is made of it."""

    config: DataConfig
    seq_len: int
    files: tuple[list[File], ...]
    """Of each source; none of a packed one."""
    tokenizer: Tokenizer | None
    """None if it is trained on the sources."""

    def pack(self) -> PackedData:
        """Does what `prepare` does, see there."""
        config, seq_len = self.config, self.seq_len
        cache = default_cache_dir()
        if config.cache_dir:
            cache = pathlib.Path(config.cache_dir).expanduser()
        tokenizer = self.tokenizer or _train_tokenizer(config, self.files, cache)
        folders, manifests = [], []
        for source, files in zip(config.sources, self.files, strict=True):
            if source.kind == "packed":
                folder = pathlib.Path(source.path).expanduser()
            else:
                folder = _pack(source, files, config, tokenizer, seq_len, cache)
            manifest = Manifest.read(folder)
            _check(folder, manifest, tokenizer, seq_len)
            folders.append(folder)
            manifests.append(manifest)
        return PackedData(config, seq_len, tokenizer, tuple(folders), tuple(manifests))


def prepare(config: DataConfig, seq_len: int) -> PackedData:
    """Packs the sources into rows of `seq_len` tokens, unless the cache has them already.

    Every process of a run may call this: where they share a cache one packs and the others wait;
    where each machine has its own cache the same files give the same rows.

    Raises:
        UserError: a path or tokenizer is missing or is not one, a source holds no text, packed rows
            have another length, or the cache cannot be written.
    """
    return find(config, seq_len).pack()


def find(config: DataConfig, seq_len: int) -> Found:
    """Lists the files and reads the tokenizer: the part of `prepare` that is short.

    Raises:
        UserError: a path or tokenizer is missing or is not one, or packed rows do not fit.
    """
    if seq_len < 2:
        raise UserError(f"seq_len={seq_len}; a row needs at least 2 tokens, one to predict another")
    files = tuple(
        [] if source.kind == "packed" else sources.list_files(source) for source in config.sources
    )
    tokenizer = None
    if config.tokenizer == "bytes":
        tokenizer = Tokenizer.from_bytes()
    elif config.tokenizer != "bpe":
        tokenizer = Tokenizer.load(config.tokenizer)
    elif not any(files):
        raise UserError("data.tokenizer=bpe has no text to train on; give a tokenizer.json")
    elif not any(file.size for its_files in files for file in its_files):
        names = ", ".join(source.name for source in config.sources if source.kind != "packed")
        raise UserError(f"{names} holds no text to train a tokenizer on; check the data source")
    if any(source.kind == "chat" for source in config.sources):
        if tokenizer is None:
            raise UserError(
                "data.tokenizer=bpe has no chat template, which a source of kind chat needs; set "
                "data.tokenizer to the folder of a model that was tuned to chat"
            )
        template_of(tokenizer)
    for source in config.sources:
        if source.kind == "packed":
            folder = pathlib.Path(source.path).expanduser()
            _check(folder, Manifest.read(folder), tokenizer, seq_len)
    return Found(config, seq_len, files, tokenizer)


def _check(
    folder: pathlib.Path, manifest: Manifest, tokenizer: Tokenizer | None, seq_len: int
) -> None:
    if manifest.seq_len != seq_len:
        longer = "longer" if seq_len > manifest.seq_len else "shorter"
        raise UserError(
            f"seq_len={seq_len} is {longer} than the packed rows of {folder} ({manifest.seq_len} "
            f"tokens); use seq_len={manifest.seq_len}, or pack the documents again"
        )
    if tokenizer and manifest.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{folder} was packed with another tokenizer; set data.tokenizer={folder}, "
            "which holds the one it was packed with"
        )


def _train_tokenizer(
    config: DataConfig, files: tuple[list[File], ...], cache: pathlib.Path
) -> Tokenizer:
    pairs = [pair for pair in zip(config.sources, files, strict=True) if pair[1]]
    key = _hash([FORMAT, config.bpe_vocab_size, [_identity(*pair) for pair in pairs]])

    def build(folder: pathlib.Path) -> None:
        with _timed(f"trained a tokenizer of {config.bpe_vocab_size} tokens"):
            texts = _sample(pairs, _BPE_SAMPLE_CHARS)
            Tokenizer.train(texts, config.bpe_vocab_size).save(str(folder))

    return Tokenizer.load(str(build_once(cache / f"bpe-{key[:24]}", build)))


def _sample(pairs: list[tuple[Source, list[File]]], max_chars: int) -> Iterator[str]:
    """Yields text from files spread over each source, by their shares, the same every time."""
    total = sum(source.weight for source, _ in pairs)
    for source, files in pairs:
        left = max_chars * source.weight / total
        most = max(int(left) // len(files), 1 << 16)
        for file in sorted(files, key=lambda file: _hash(file.url.rpartition("/")[2])):
            of_file = most
            for text in read_documents(source, [file], ReadReport()):
                yield text[:of_file]
                left -= len(text[:of_file])
                of_file -= len(text)
                if of_file <= 0:
                    break
            if left <= 0:
                break


def _pack(
    source: Source,
    files: list[File],
    config: DataConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    cache: pathlib.Path,
) -> pathlib.Path:
    key_of: list[Any] = [FORMAT, _identity(source, files), tokenizer.fingerprint, seq_len]
    key_of.append(config.eval_fraction)
    if source.kind == "chat":
        key_of += [MASKED_FORMAT, template_of(tokenizer)]

    def build(folder: pathlib.Path) -> None:
        report = ReadReport()
        with _timed(f"packed {source.name}"):
            about = report, source.name, sum(file.size for file in files)
            if source.kind == "chat":
                conversations = _with_progress(read_conversations(source, files, report), *about)
                documents = encode_conversations(conversations, tokenizer, seq_len, report)
            else:
                texts = _with_progress(read_documents(source, files, report), *about)
                documents = encode_texts(texts, tokenizer)
            pack_documents(
                documents,
                folder,
                tokenizer=tokenizer,
                seq_len=seq_len,
                eval_fraction=config.eval_fraction,
                source=source.name,
                files=len(files),
                report=report,
            )
        if report.undecodable:
            print(
                f"data: left out {report.undecodable} documents of {source.name} that are not "
                f"UTF-8, such as {report.undecodable_examples[0]}",
                file=sys.stderr,
            )

        if report.cut or report.unanswered:
            print(
                f"data: at train.seq_len={seq_len}, {report.cut} conversations of {source.name} "
                f"are longer and end with it; left out {report.unanswered} without an answer in it",
                file=sys.stderr,
            )

    return build_once(cache / f"rows-{_hash(key_of)[:24]}", build)


def _with_progress(
    texts: Iterator[T], report: ReadReport, name: str, total_bytes: int
) -> Iterator[T]:
    """Passes documents on under a progress bar."""
    with progress(f"packing {name}", total_bytes) as show:
        for text in texts:
            yield text
            show(report.bytes_read)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"data: {what} in {time.monotonic() - start:.1f} s", file=sys.stderr)


def _identity(source: Source, files: list[File]) -> object:
    return [source.kind, source.field, [dataclasses.astuple(file) for file in files]]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
