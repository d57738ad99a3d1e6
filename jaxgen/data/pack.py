"""Packing: documents are encoded, cut or put together into fixed rows, and split in two sets."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxgen.data.chat import Conversation, encode_chats
from jaxgen.data.documents import ReadReport
from jaxgen.data.rows import (
    FORMAT,
    MASKED_FORMAT,
    MASKED_TOKEN,
    SPLITS,
    Manifest,
    ShardWriter,
    SplitInfo,
    encode_row,
    file_errors,
    open_shard,
    shard_name,
)
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError

# Rows still open to a fitting document; the packer's memory is this many rows. With 1,024 the files
# of the Python standard library leave 0.5% of rows of 4,096 tokens as padding, 0.1% of 256.
_WINDOW = 1024

# Documents are encoded together by this many characters, enough to keep every core busy.
_ENCODE_CHARS = 4 << 20

# Conversations are encoded together by this many.
_ENCODE_CHATS = 1000

# A document longer than this is held out, or not, in parts: one large file must have both.
_SPLIT_TOKENS = 8192

_SHARD_BYTES = 256 << 20


class RowPacker:
    """Best-fit packing in a bounded window of open rows.

    A piece goes to the open row in which it leaves the least space. Full rows leave at once; beyond
    the window the fullest leaves.
    """

    def __init__(self, seq_len: int, window: int = _WINDOW):
        self._seq_len = seq_len
        self._window = window
        self._open: dict[int, list[list[np.ndarray]]] = {}
        self._count = 0
        self._spaces = 0  # bit s is set where a row with space s is open

    def add(self, piece: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Places a piece of at most `seq_len` tokens; yields the rows that are thereby done."""
        size = len(piece)
        fitting = self._spaces >> size
        if fitting:
            space = (fitting & -fitting).bit_length() - 1 + size
            row = self._take(space)
        else:
            space, row = self._seq_len, []
        row.append(piece)
        if space == size:
            yield row
            return
        self._put(space - size, row)
        if self._count > self._window:
            yield self._take((self._spaces & -self._spaces).bit_length() - 1)

    def finish(self) -> Iterator[list[np.ndarray]]:
        """Yields the rows that are still open."""
        for space in sorted(self._open):
            yield from self._open[space]
        self._open, self._count, self._spaces = {}, 0, 0

    def _take(self, space: int) -> list[np.ndarray]:
        rows = self._open[space]
        row = rows.pop(0)
        self._count -= 1
        if not rows:
            del self._open[space]
            self._spaces ^= 1 << space
        return row

    def _put(self, space: int, row: list[np.ndarray]) -> None:
        self._open.setdefault(space, []).append(row)
        self._spaces |= 1 << space
        self._count += 1


class _SplitWriter:
    """Writes the rows of one split into shards."""

    def __init__(self, folder: pathlib.Path, split: str, seq_len: int, dtype: np.dtype):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._packer = RowPacker(seq_len)
        self._seq_len = seq_len
        self.rows_per_shard = max(1, _SHARD_BYTES // (seq_len * dtype.itemsize))
        self._writer: ShardWriter | None = None
        self._digest = hashlib.sha256()
        self.rows = self.tokens = self.targets = self.text_bytes = 0

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Cuts ids into pieces of at most a row, and packs those."""
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        for start in range(0, len(ids), self._seq_len):
            piece = ids[start : start + self._seq_len]
            masked = piece.dtype == MASKED_TOKEN
            self.targets += int(piece["counted"][1:].sum()) if masked else len(piece) - 1
            for row in self._packer.add(piece):
                self._write(row)

    def finish(self) -> SplitInfo:
        for row in self._packer.finish():
            self._write(row)
        self._close()
        shards = sorted(self._folder.glob(f"{self._split}-*"))
        sizes = tuple(shard.stat().st_size for shard in shards)
        return SplitInfo(self.rows, self.tokens, self.targets, self.text_bytes, sizes)

    def digest(self) -> bytes:
        return self._digest.digest()

    def _write(self, row: list[np.ndarray]) -> None:
        if self.rows % self.rows_per_shard == 0:
            self._close()
            path = self._folder / shard_name(self._split, self.rows // self.rows_per_shard)
            self._writer = open_shard(path)
        assert self._writer is not None
        record = encode_row(row, self._dtype)
        self._digest.update(record)
        with file_errors():
            self._writer.write(record)
        self.rows += 1

    def _close(self) -> None:
        if self._writer is not None:
            with file_errors():
                self._writer.close()


class Document(NamedTuple):
    """A document that is packed."""

    raw: bytes
    """Its text, which decides whether it is held out."""
    text_bytes: int
    """How much of the text its tokens stand for, or of a conversation those that count."""
    tokens: np.ndarray
    """Its ids, or of a conversation `MASKED_TOKEN`."""


def encode_texts(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Document]:
    """Yields each text: begin of text (where there is one), text, end of text."""
    waiting, size = [], 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= _ENCODE_CHARS:
            yield from _encode(waiting, tokenizer)
            waiting, size = [], 0
    yield from _encode(waiting, tokenizer)


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[Document]:
    for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
        raw = text.encode()
        yield Document(raw, len(raw), ids)


def encode_conversations(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, seq_len: int, report: ReadReport
) -> Iterator[Document]:
    """Yields what the chat template writes of each conversation, and which tokens of it count.

    One longer than a row ends with it, for what follows could not be told without it; one that is
    left without a token that counts is left out. Both are counted in `report`.

    Raises:
        UserError: as `chat.encode_chats`.
    """
    left = iter(conversations)
    for some in iter(lambda: list(itertools.islice(left, _ENCODE_CHATS)), []):
        for whole, ids, counted in encode_chats(tokenizer, some):
            tokens = np.empty(min(len(ids), seq_len), MASKED_TOKEN)
            tokens["id"], tokens["counted"] = ids[:seq_len], counted[:seq_len]
            # Nothing stands before the first token from which it could be told.
            if not tokens["counted"][1:].any():
                report.unanswered += 1
                continue
            report.cut += len(ids) > seq_len
            said = tokenizer.decode(tokens["id"][tokens["counted"]], special=True)
            yield Document(whole.encode(), len(said.encode()), tokens)


def pack_documents(
    documents: Iterable[Document],
    folder: pathlib.Path,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    eval_fraction: float,
    source: str,
    files: int,
    report: ReadReport,
) -> Manifest:
    """Packs documents, all with a mask or none, into `folder`; writes the manifest last.

    One longer than a row is cut into rows; no other is cut. Whether a document is held out depends
    on its text alone, so copies of it land on one side.

    Raises:
        UserError: there is no document.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    train, held_out = writers = [_SplitWriter(folder, s, seq_len, dtype) for s in SPLITS]
    block = max(1, _SPLIT_TOKENS // seq_len) * seq_len
    num_documents, last, masked = 0, None, False
    for raw, size, ids in documents:
        num_documents += 1
        masked = ids.dtype == MASKED_TOKEN
        key = hashlib.blake2b(raw, digest_size=8).digest()
        for part, start in enumerate(range(0, len(ids), block)):
            piece = ids[start : start + block]
            done = min(start + block, len(ids))
            num_bytes = size * done // len(ids) - size * start // len(ids)
            draw = hashlib.blake2b(key + part.to_bytes(8), digest_size=8).digest()
            if int.from_bytes(draw) < eval_fraction * 2**64:
                held_out.add(piece, num_bytes)
            else:
                # The newest waits: if chance has held out nothing at the end, it is held out.
                if last is not None:
                    train.add(*last)
                last = piece, num_bytes
    if last is not None:
        spare = eval_fraction > 0 and train.tokens > 0 and held_out.tokens == 0
        (held_out if spare else train).add(*last)
    if num_documents == 0:
        late = report.unanswered
        raise UserError(
            f"{source} holds {'nothing to learn' if late else 'no text'}: {files} files, "
            f"{report.undecodable} documents that are not UTF-8, {report.empty} empty, {late} "
            f"without an answer in their first {seq_len} tokens; check the data source"
            + (", or raise train.seq_len" if late else "")
        )
    info = [writer.finish() for writer in writers]
    manifest = Manifest(
        format=MASKED_FORMAT if masked else FORMAT,
        source=source,
        files=files,
        documents=num_documents,
        undecodable=report.undecodable,
        undecodable_examples=tuple(report.undecodable_examples),
        empty=report.empty,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        seq_len=seq_len,
        token_dtype=dtype.str,
        rows_per_shard=train.rows_per_shard,
        train=info[0],
        eval=info[1],
        digest=hashlib.sha256(train.digest() + held_out.digest()).hexdigest(),
        cut=report.cut,
        unanswered=report.unanswered,
    )
    tokenizer.save(str(folder))
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=2))
    return manifest
