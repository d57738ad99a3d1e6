"""Packed rows on disk: ArrayRecord shards, and a manifest that is written last.

A row is up to `seq_len` tokens of one or more documents. A record holds it as little-endian
`uint32` counts (how many segments, then their lengths) and the tokens as `uint16`, or `uint32` for
a vocabulary above 65,536. Segment ids and positions follow from the lengths. Conversations have a
bit a token besides, at the end of the record: whether it counts, being the assistant's.
"""

import dataclasses
import json
import pathlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from array_record.python.array_record_module import ArrayRecordWriter as ShardWriter

from jaxgen.errors import UserError

# 1 and 2, whose manifests did not count targets, are packed again.
FORMAT = 3
# The format of conversations, which a reader that knows no masks must not take.
MASKED_FORMAT = 4
MASKED_TOKEN = np.dtype([("id", np.int32), ("counted", np.bool_)])
SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """What one split of a packed source holds."""

    rows: int
    tokens: int
    targets: int
    """Tokens that count in the loss: that follow another of their document in their row, and are
    the assistant's in a conversation."""
    text_bytes: int
    """Bytes of UTF-8 that the tokens stand for; of conversations, those that count."""
    shard_bytes: tuple[int, ...]
    """Size of each shard's file."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a packed source."""

    format: int
    source: str
    files: int
    documents: int
    undecodable: int
    undecodable_examples: tuple[str, ...]
    empty: int
    tokenizer: str
    """The tokenizer's fingerprint."""
    vocab_size: int
    seq_len: int
    token_dtype: str
    rows_per_shard: int
    train: SplitInfo
    eval: SplitInfo
    digest: str
    """SHA-256 of all rows: two packs with one digest give the same batches."""
    cut: int = 0
    """Conversations that were longer than a row, and end with it."""
    unanswered: int = 0
    """Conversations left out because nothing in a row of them counts."""

    @staticmethod
    def read(folder: pathlib.Path) -> "Manifest":
        """Reads the manifest of a packed source.

        Raises:
            UserError: there is none, or it is not one of this version.
        """
        path = folder / "manifest.json"
        try:
            fields = json.loads(path.read_text())
            if fields["format"] not in (FORMAT, MASKED_FORMAT):
                raise UserError(
                    f"{path} has format {fields['format']}, not {FORMAT} or {MASKED_FORMAT}; "
                    "pack it again"
                )
            for split in SPLITS:
                split_fields = fields[split]
                split_fields["shard_bytes"] = tuple(split_fields["shard_bytes"])
                fields[split] = SplitInfo(**split_fields)
            fields["undecodable_examples"] = tuple(fields["undecodable_examples"])
            return Manifest(**fields)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} is not a folder of packed rows; pack it first") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {folder} and try again") from None


class PackedRows:
    """The rows of one split of a packed source, by index; safe to read from several threads."""

    def __init__(self, folder: pathlib.Path, manifest: Manifest, split: str):
        self.manifest = manifest
        self.info: SplitInfo = getattr(manifest, split)
        self._shards = [
            folder / shard_name(split, number) for number in range(len(self.info.shard_bytes))
        ]
        for path, size in zip(self._shards, self.info.shard_bytes, strict=True):
            found = path.stat().st_size if path.exists() else 0
            if found != size:
                raise UserError(
                    f"{path} has {found} bytes where its manifest says {size}; "
                    f"delete {folder} and pack it again"
                )
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.info.rows

    def __getitem__(self, index: int) -> list[np.ndarray]:
        """Returns the segments of one row as int32 ids, or as `MASKED_TOKEN`.

        Raises:
            UserError: its bytes are not those that were written.
        """
        shard, record = divmod(index, self.manifest.rows_per_shard)
        path = self._shards[shard]
        try:
            with self._lock:
                if shard not in self._readers:
                    # No read-ahead: rows are read in shuffled order.
                    self._readers[shard] = ArrayRecordReader(
                        str(path), "readahead_buffer_size:0,max_parallelism:0"
                    )
                raw = self._readers[shard].read([record])[0]
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"{path} is damaged ({error}); delete {path.parent} and pack it again"
            ) from None
        return decode_row(raw, np.dtype(self.manifest.token_dtype))


def shard_name(split: str, number: int) -> str:
    """The file name of a shard."""
    return f"{split}-{number:05d}.array_record"


def encode_row(row: list[np.ndarray], dtype: np.dtype) -> bytes:
    """Returns the record of a row of segments."""
    counts = np.array([len(row), *map(len, row)], "<u4")
    tokens = np.concatenate(row)
    if tokens.dtype != MASKED_TOKEN:
        return counts.tobytes() + tokens.astype(dtype).tobytes()
    mask = np.packbits(tokens["counted"])
    return counts.tobytes() + tokens["id"].astype(dtype).tobytes() + mask.tobytes()


def decode_row(record: bytes, dtype: np.dtype) -> list[np.ndarray]:
    """Returns the segments that `encode_row` was given, as int32 or as `MASKED_TOKEN`."""
    count = int(np.frombuffer(record, "<u4", 1)[0])
    lengths = np.frombuffer(record, "<u4", count, 4)
    start, size = 4 * (count + 1), int(lengths.sum())
    tokens = np.frombuffer(record, dtype, size, start).astype(np.int32)
    if len(record) > (end := start + size * dtype.itemsize):
        ids, tokens = tokens, np.empty(size, MASKED_TOKEN)
        tokens["id"] = ids
        tokens["counted"] = np.unpackbits(np.frombuffer(record, np.uint8, offset=end), count=size)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def open_shard(path: pathlib.Path) -> ShardWriter:
    """Returns a writer of records; write to it and close it under `file_errors`."""
    # One row a chunk: a row is read alone, wherever the shuffle puts it.
    return ShardWriter(str(path), "group_size:1,zstd:1")


@contextmanager
def file_errors() -> Iterator[None]:
    """Turns ArrayRecord's RuntimeError on a file, such as one on a full disk, into OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error
