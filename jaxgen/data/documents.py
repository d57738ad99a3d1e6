"""Documents and conversations out of files: text and code, JSONL, Parquet."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jaxgen.data.chat import Conversation, check_conversation
from jaxgen.data.sources import File, Source, open_bytes, read_bytes
from jaxgen.errors import UserError

T = TypeVar("T")


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
    cut: int = 0
    """Conversations that were longer than a row, and end with it."""
    unanswered: int = 0
    """Conversations left out because nothing in a row of them counts."""

    def decode(self, raw: bytes, where: str) -> str | None:
        """Returns the text, or None after counting a document that is not UTF-8."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.undecodable += 1
            if len(self.undecodable_examples) < 10:
                self.undecodable_examples.append(where)
            return None


def read_documents(source: Source, files: list[File], report: ReadReport) -> Iterator[str]:
    """Yields the documents of `files` in order.

    A document that is not UTF-8 or holds no text is left out and counted in `report`.

    Raises:
        UserError: a file is not of the source's kind, or a record lacks the text field.
    """

    def read(file: File) -> Iterator[str]:
        if source.kind not in ("jsonl", "parquet"):
            text = report.decode(read_bytes(file.url), file.url)
            if text is not None:
                yield text
            return
        for where, record in _records(file, source, report):
            text = _text_of(record[source.field], where, source.field)
            # JSON can spell half of a surrogate pair, which is no character.
            if report.decode(text.encode("utf-8", "surrogatepass"), where) is not None:
                yield text

    for text in _tracked(files, report, read, len):
        if text.strip():
            yield text
        else:
            report.empty += 1


def read_conversations(
    source: Source, files: list[File], report: ReadReport
) -> Iterator[Conversation]:
    """Yields the conversations of `files` in order.

    One that is not UTF-8 is left out and counted in `report`.

    Raises:
        UserError: a file is neither JSONL nor Parquet, or a record is no conversation.
    """

    def read(file: File) -> Iterator[Conversation]:
        for where, record in _records(file, source, report):
            conversation = check_conversation(record, source.field, where)
            text = json.dumps(conversation.messages, ensure_ascii=False)
            if report.decode(text.encode("utf-8", "surrogatepass"), where) is not None:
                yield conversation

    def size(conversation: Conversation) -> int:
        return sum(len(message.get("content") or "") for message in conversation.messages)

    return _tracked(files, report, read, size)


def _tracked(
    files: list[File],
    report: ReadReport,
    read: Callable[[File], Iterator[T]],
    size: Callable[[T], int],
) -> Iterator[T]:
    """Yields what is read of each file, and keeps the report's count of bytes."""
    done = 0
    for file in files:
        report.bytes_read = done
        for item in read(file):
            # A compressed file holds more text than its size; the bar must not run past it.
            report.bytes_read = min(report.bytes_read + size(item), done + file.size)
            yield item
        done += file.size
        report.bytes_read = done


def _records(
    file: File, source: Source, report: ReadReport
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields where each record is, and its fields, of which the source's is there."""
    chat = source.kind == "chat"
    if source.kind == "parquet" or (chat and file.url.endswith(".parquet")):
        yield from _parquet_records(file, [source.field, "tools"] if chat else [source.field])
        return
    with open_bytes(file.url) as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{file.url}:{number}"
            line = report.decode(raw, where)
            if line is None or not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not JSON ({error}); correct or remove it") from None
            if not isinstance(record, dict) or source.field not in record:
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(
                    f"{where} has no field {source.field!r} but {keys}; set the source's text_field"
                )
            yield where, record


def _parquet_records(file: File, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields records of these columns; all but the first may be absent."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file.url} needs pyarrow to be read; install it with: pip install 'jaxgen[parquet]'"
        ) from None
    with open_bytes(file.url) as content:
        try:
            table = pyarrow.parquet.ParquetFile(content)
            names = table.schema_arrow.names
            if columns[0] not in names:
                raise UserError(
                    f"{file.url} has no column {columns[0]!r} but {', '.join(names)}; "
                    "set the source's text_field"
                )
            number = 0
            for batch in table.iter_batches(
                batch_size=1024, columns=[name for name in columns if name in names]
            ):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file.url}:{number}", record
        except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
            raise UserError(f"{file.url} is not a Parquet file, or damaged: {error}") from None


def _text_of(value: Any, where: str, text_field: str) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{where}: field {text_field!r} holds {type(value).__name__}, not text; "
            "set the source's text_field"
        )
    return value or ""
