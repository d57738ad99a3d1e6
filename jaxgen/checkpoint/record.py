"""What makes a checkpoint complete: a record of its arrays and files, written last.

Orbax writes a step's arrays; then the record `jaxgen.json` is put beside them in one rename. A
folder without it is an interrupted save. It holds every array's dtype and shape, every file's size
and, on a local file system, CRC-32, and a CRC-32 of itself; so damage is found before anything is
loaded. Object stores check the content of what they hold themselves.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from jaxgen.checkpoint.address import is_local

RECORD = "jaxgen.json"
FORMAT = 1
_READERS = 8
_CHUNK_BYTES = 1 << 22


class Damaged(Exception):
    """A checkpoint is not what was written; the message says how."""


@dataclasses.dataclass(frozen=True)
class Record:
    """All about one saved step but its arrays' content."""

    step: int
    metadata: dict[str, Any]
    """What the caller saved beside the arrays: JSON values."""
    arrays: dict[str, tuple[str, tuple[int, ...]]]
    """Name, as in model/layers/attention/q -> dtype and shape, in the order of the tree."""
    files: dict[str, tuple[int, int | None]] = dataclasses.field(default_factory=dict)
    """Path below the step's folder -> bytes and CRC-32; None where the store checks content."""


def write(folder: epath.Path, record: Record) -> None:
    """Completes the checkpoint in `folder`: records its files, in one atomic last write."""
    record = dataclasses.replace(record, files=_measure(folder))
    body = json.dumps({"format": FORMAT, **dataclasses.asdict(record)}, allow_nan=True)
    text = f'{{"crc32": {zlib.crc32(body.encode())}, "record":\n{body}\n}}\n'
    if not is_local(folder):
        (folder / RECORD).write_text(text)  # One object appears whole.
        return
    temporary = folder / f"{RECORD}.tmp"
    temporary.write_text(text)
    temporary.rename(folder / RECORD)


def read(folder: epath.Path) -> Record:
    """Returns the record of a complete checkpoint.

    Raises:
        Damaged: there is none, or it is not what was written.
    """
    try:
        head, body, tail = (folder / RECORD).read_bytes().split(b"\n", 2)
        crc = json.loads(head + b"null}")["crc32"]
        data = json.loads(body)
    except FileNotFoundError:
        raise Damaged(f"it has no {RECORD}: its save was interrupted, or still runs") from None
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"{RECORD} is not readable: {error}") from error
    if crc != zlib.crc32(body) or tail != b"}\n":
        raise Damaged(f"{RECORD} was changed after it was written")
    if data.pop("format") != FORMAT:
        raise Damaged(f"{RECORD} is of another version of jaxgen")
    arrays = {name: (dtype, tuple(shape)) for name, (dtype, shape) in data.pop("arrays").items()}
    files = {name: (size, crc) for name, (size, crc) in data.pop("files").items()}
    return Record(arrays=arrays, files=files, **data)


def verify(folder: epath.Path, record: Record, only: str | None = None) -> None:
    """Checks that the files are those that were written; with `only`, those of one part.

    Raises:
        Damaged: the first that is missing, truncated or changed.
    """
    wanted = [
        name for name in record.files if only is None or "/" not in name or _part(name) == only
    ]
    found = _measure(folder, wanted)
    for name in wanted:
        if name not in found:
            raise Damaged(f"{name} is missing")
        (size, crc), (found_size, found_crc) = record.files[name], found[name]
        if found_size != size:
            raise Damaged(f"{name} has {found_size} bytes of {size}")
        if crc is not None and found_crc is not None and found_crc != crc:
            raise Damaged(f"{name} was changed after it was written (CRC-32)")


def _part(name: str) -> str:
    return name.split("/", 1)[0]


def _walk(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        name = f"{prefix}{path.name}"
        if path.is_dir():
            yield from _walk(path, f"{name}/")
        elif not name.startswith(RECORD):
            yield name


def _measure(
    folder: epath.Path, names: list[str] | None = None
) -> dict[str, tuple[int, int | None]]:
    """Sizes and checksums of those of the files that exist, by default of all."""
    if not is_local(folder):
        return _listed(folder)
    names = sorted(_walk(folder)) if names is None else names

    def one(name: str) -> tuple[int, int] | None:
        path = folder / name
        try:
            size = crc = 0
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    size, crc = size + len(chunk), zlib.crc32(chunk, crc)
            return size, crc
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_READERS) as readers:
        found = zip(names, readers.map(one, names), strict=True)
        return {name: measures for name, measures in found if measures}


def _listed(folder: epath.Path) -> dict[str, tuple[int, int | None]]:
    """Sizes of all files in an object store: one request for a thousand of them."""
    import fsspec

    store, root = fsspec.core.url_to_fs(str(folder))
    found = {name[len(root) + 1 :]: info for name, info in store.find(root, detail=True).items()}
    return {
        name: (info["size"], None) for name, info in found.items() if not name.startswith(RECORD)
    }
