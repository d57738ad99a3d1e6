"""Documents from files: text and code by glob, JSONL, Parquet, wherever fsspec can read.

The order of the documents is the sorted order of the files, so two machines that see the same
files pack the same rows.
"""

import dataclasses
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal, get_args

from jaxgen.errors import UserError, is_of_store

Kind = Literal["stdlib", "text", "jsonl", "parquet", "packed"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from, and how often they are drawn."""

    kind: Kind = "stdlib"
    """`text` (a file is a document), `jsonl`, `parquet`, `packed` (a folder that `jaxgen data pack`
    made elsewhere), or `stdlib`: the source code of the running Python's standard library."""
    path: str = ""
    """A file, a glob (`data/**/*.py`) or a URL of either (`gs://bucket/*.jsonl`). Empty for
    `stdlib`. Names that begin with a dot are not matched by a wildcard."""
    text_field: str = "text"
    """The JSONL key or Parquet column that holds the document."""
    weight: float = 1.0
    """Share of the training rows relative to the other sources' weights."""

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise UserError(
                f"data source kind {self.kind!r} is unknown; use one of {', '.join(get_args(Kind))}"
            )
        if self.kind != "stdlib" and not self.path:
            raise UserError(f"data source of kind {self.kind} has no path; give a file or a glob")
        if self.kind == "stdlib" and self.path:
            raise UserError(
                f"data source path={self.path!r} has kind=stdlib, which takes no path; "
                "use kind=text, jsonl or parquet"
            )
        if not self.weight > 0:
            raise UserError(f"data source weight={self.weight}; use a positive number")

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


@dataclasses.dataclass
class ReadReport:
    """What reading a source has met so far."""

    bytes_read: int = 0
    """Of the files' sizes, for a progress bar."""
    undecodable: int = 0
    """Documents left out because they are not UTF-8."""
    undecodable_examples: list[str] = dataclasses.field(default_factory=list)
    """Where the first ten of them are."""
    empty: int = 0
    """Documents left out because they hold no text."""

    def decode(self, raw: bytes, where: str) -> str | None:
        """Returns the text, or None after counting a document that is not UTF-8."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.undecodable += 1
            if len(self.undecodable_examples) < 10:
                self.undecodable_examples.append(where)
            return None


def list_files(source: Source) -> list[File]:
    """Returns the source's files, sorted by location.

    Raises:
        UserError: nothing is there, or the location cannot be read.
    """
    files = _list_stdlib() if source.kind == "stdlib" else _list_location(source.path)
    if not files:
        raise UserError(f"no file matches {source.name}; check the path of the data source")
    return sorted(files, key=lambda file: file.url)


def read_documents(source: Source, files: list[File], report: ReadReport) -> Iterator[str]:
    """Yields the documents of `files` in order.

    A document that is not UTF-8 or holds no text is left out and counted in `report`.

    Raises:
        UserError: a file is not of the source's kind, or a record lacks the text field.
    """
    read = {"jsonl": _read_jsonl, "parquet": _read_parquet}.get(source.kind, _read_text)
    done = 0
    for file in files:
        report.bytes_read = done
        for text in read(file, source.text_field, report):
            # A compressed file holds more text than its size; the bar must not run past it.
            report.bytes_read = min(report.bytes_read + len(text), done + file.size)
            if text.strip():
                yield text
            else:
                report.empty += 1
        done += file.size
        report.bytes_read = done


def read_bytes(url: str) -> bytes:
    """Returns the content of a file at any location.

    Raises:
        UserError: it is missing or cannot be read.
    """
    with _open(url) as file:
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


def is_empty(url: str) -> bool:
    """Whether nothing is below a location, which need not be there."""
    with _advice(url):
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        return not fs.exists(path) or (fs.isdir(path) and not fs.ls(path, detail=False))


def exists(url: str) -> bool:
    """Whether there is a file at a location."""
    with _advice(url):
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        return fs.isfile(path)


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


def _read_text(file: File, text_field: str, report: ReadReport) -> Iterator[str]:
    del text_field
    text = report.decode(read_bytes(file.url), file.url)
    if text is not None:
        yield text


def _read_jsonl(file: File, text_field: str, report: ReadReport) -> Iterator[str]:
    with _open(file.url) as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{file.url}:{number}"
            line = report.decode(raw, where)
            if line is None or not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not JSON ({error}); correct or remove it") from None
            if not isinstance(record, dict) or text_field not in record:
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(
                    f"{where} has no field {text_field!r} but {keys}; set the source's text_field"
                )
            text = _text_of(record[text_field], where, text_field)
            # JSON can spell half of a surrogate pair, which is no character.
            if report.decode(text.encode("utf-8", "surrogatepass"), where) is not None:
                yield text


def _read_parquet(file: File, text_field: str, report: ReadReport) -> Iterator[str]:
    del report  # Parquet's strings are UTF-8 by its own format.
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file.url} needs pyarrow to be read; install it with: pip install 'jaxgen[parquet]'"
        ) from None
    with _open(file.url) as content:
        try:
            table = pyarrow.parquet.ParquetFile(content)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file.url} is not a Parquet file: {error}") from None
        names = table.schema_arrow.names
        if text_field not in names:
            raise UserError(
                f"{file.url} has no column {text_field!r} but {', '.join(names)}; "
                "set the source's text_field"
            )
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                yield _text_of(value, file.url, text_field)


def _text_of(value: Any, where: str, text_field: str) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{where}: field {text_field!r} holds {type(value).__name__}, not text; "
            "set the source's text_field"
        )
    return value or ""


@contextmanager
def _open(url: str) -> Iterator[IO[bytes]]:
    with _advice(url):
        import fsspec

        opened: Any = fsspec.open(url, "rb", compression="infer")
        file = opened.open()
    with file:
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
    except OSError as error:
        raise UserError(f"{url} cannot be used: {error.strerror or error}") from None
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise UserError(f"{url}: {error}; use a path, gs://, s3:// or another fsspec URL") from None
    except Exception as error:
        if not is_of_store(error):
            raise
        raise UserError(f"{url} cannot be used: {error}") from None
