"""Where documents come from, and files at any location that fsspec can reach.

The order of the documents is the sorted order of the files, so two machines that see the same
files pack the same rows.
"""

import dataclasses
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal, get_args

from jaxgen.errors import UserError, is_of_store
from jaxgen.ranges import Positive, check_ranges

Kind = Literal["stdlib", "text", "jsonl", "parquet", "chat", "packed"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from, and how often they are drawn."""

    kind: Kind = "stdlib"
    """`text` (a file is a document), `jsonl`, `parquet`, `chat` (conversations in either, of which
    the assistant's turns count), `packed` (a folder that `jaxgen data pack` made elsewhere), or
    `stdlib`: the source code of the running Python's standard library."""
    path: str = ""
    """A file, a glob (`data/**/*.py`) or a URL of either (`gs://bucket/*.jsonl`). Empty for
    `stdlib`. Names that begin with a dot are not matched by a wildcard."""
    text_field: str = ""
    """The JSONL key or Parquet column that holds the document. Empty: `text`, of conversations
    `messages`."""
    weight: Positive = 1.0
    """Share of the training rows relative to the other sources' weights."""

    def __post_init__(self):
        check_ranges(self, "data source ")
        if self.kind not in get_args(Kind):
            raise UserError(
                f"data source kind {self.kind!r} is unknown; use one of {', '.join(get_args(Kind))}"
            )
        if self.kind != "stdlib" and not self.path:
            raise UserError(f"data source of kind {self.kind} has no path; give a file or a glob")
        if self.kind == "packed" and "://" in self.path:
            raise UserError(
                f"data source path={self.path!r} of kind packed is a URL; packed rows are read at "
                "random, so copy them to a folder on this machine"
            )
        if self.kind == "stdlib" and self.path:
            raise UserError(
                f"data source path={self.path!r} has kind=stdlib, which takes no path; "
                "use kind=text, jsonl, parquet or chat"
            )

    @property
    def field(self) -> str:
        """The key or column that holds the document."""
        return self.text_field or ("messages" if self.kind == "chat" else "text")

    @property
    def name(self) -> str:
        """What reports and messages call this source."""
        return self.path or "the Python standard library"


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a source. `version` changes when its content does, as far as the store tells."""

    url: str
    size: int
    version: str


def list_files(source: Source) -> list[File]:
    """Returns the source's files, sorted by location.

    Raises:
        UserError: nothing is there, or the location cannot be read.
    """
    files = _list_stdlib() if source.kind == "stdlib" else _list_location(source.path)
    if not files:
        raise UserError(f"no file matches {source.name}; check the path of the data source")
    return sorted(files, key=lambda file: file.url)


def read_bytes(url: str) -> bytes:
    """Returns the content of a file at any location.

    Raises:
        UserError: it is missing or cannot be read.
    """
    with open_bytes(url) as file:
        return file.read()


def read_range(url: str, start: int, stop: int) -> bytes:
    """Returns bytes `start` to `stop` of a file at any location; fewer where it ends before.

    Raises:
        UserError: it is missing or cannot be read.
    """
    with _advice(url):
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        return fs.cat_file(path, start=start, end=stop)


def size(url: str) -> int:
    """Returns how many bytes a file at any location has.

    Raises:
        UserError: it is missing or cannot be read.
    """
    with _advice(url):
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        return fs.size(path)


def check_empty(url: str) -> None:
    """Checks that a folder at any location, which need not be there, can be written anew.

    Raises:
        UserError: something is there.
    """
    with _advice(url):
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        if fs.exists(path) and (not fs.isdir(path) or fs.ls(path, detail=False)):
            raise UserError(f"{url} is not empty; give a new folder, or empty this one")


def exists(url: str) -> bool:
    """Whether there is a file at a location."""
    with _advice(url):
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        return fs.isfile(path)


def names_in(url: str) -> list[str]:
    """Returns the names of the files in a folder at any location; none where there is no folder."""
    with _advice(url):
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        found = fs.find(path, maxdepth=1) if fs.isdir(path) else []
        return [name.rpartition("/")[2] for name in found]


def write_bytes(url: str, content: bytes) -> None:
    """Writes a file at any location, making its folder.

    Raises:
        UserError: the location cannot be written.
    """
    with _advice(url):
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(path, content)


def write_json(url: str, value: Any) -> None:
    """Writes a value as a JSON file at any location, making its folder.

    Raises:
        UserError: the location cannot be written.
    """
    write_bytes(url, (json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def writing(url: str) -> Iterator[IO[bytes]]:
    """Yields a file at any location to write into, and makes its folder.

    Raises:
        UserError: the location cannot be written.
    """
    with _advice(url):
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        with fs.open(path, "wb") as file:
            yield file


def _list_stdlib() -> list[File]:
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - {"site-packages", "dist-packages", "__pycache__"})
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                stat = os.stat(path)
                files.append(File(path, stat.st_size, str(stat.st_mtime)))
    return files


def _list_location(path: str) -> list[File]:
    with _advice(path):
        import fsspec

        fs, root = fsspec.core.url_to_fs(path)
        if fs.isdir(root):
            raise UserError(f"data source {path} is a folder; give a glob such as {path}/**/*.txt")
        if fs.isfile(root):
            found = {root: fs.info(root)}
        else:
            # A wildcard must not pick up .git, .venv or an editor's backup; a path spelt out may.
            spelt_out = len(re.split(r"[*?\[]", root)[0])
            found = {
                name: info
                for name, info in fs.glob(root, detail=True).items()
                if info["type"] == "file" and not _hidden(name, spelt_out)
            }
        files = []
        for name, info in found.items():
            # The keys by which local, Google, Amazon, Azure and HTTP stores tell versions.
            keys = ("mtime", "updated", "LastModified", "last_modified", "ETag", "created")
            version = next((str(info[key]) for key in keys if info.get(key) is not None), "")
            url = fs.unstrip_protocol(name) if "://" in path else name
            files.append(File(url, info["size"] or 0, version))
        return files


def _hidden(name: str, spelt_out: int) -> bool:
    """Whether a wildcard, not the spelt-out part of the pattern, matched a dot file or folder."""
    folder = name.rfind("/", 0, spelt_out)
    return "/." in name[max(folder, 0) :]


@contextmanager
def open_bytes(url: str) -> Iterator[IO[bytes]]:
    """Yields a file at any location to read from, decompressed by its name.

    Raises:
        UserError: it is missing or cannot be read; also while it is read.
    """
    with _advice(url):
        import fsspec

        opened: Any = fsspec.open(url, "rb", compression="infer")
        with opened.open() as file:
            yield file


@contextmanager
def _advice(url: str) -> Iterator[None]:
    """Turns what a location's driver says into a line for the user."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url} does not exist; check the path") from None
    except ImportError as error:
        raise UserError(f"{url} cannot be read: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{url} cannot be used: {said}") from None
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise UserError(f"{url}: {error}; use a path, gs://, s3:// or another fsspec URL") from None
    except Exception as error:
        if not is_of_store(error):
            raise
        raise UserError(f"{url} cannot be used: {error}") from None
