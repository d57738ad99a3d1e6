"""Prompts from a JSONL file, answers into another: any number of lines, in bounded memory."""

import dataclasses
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from jaxgen import fields
from jaxgen.data import sources
from jaxgen.data.chat import check_conversation, encode_prompt
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.progress import progress
from jaxgen.serve.answer import Answer
from jaxgen.serve.engine import Engine
from jaxgen.serve.request import QueueFull, SamplingConfig, check_bias, check_prompt

# Lines under way for each that the engine serves at once: answers are written in the lines' order,
# and while a long one is waited for the others go on.
LINES_AHEAD = 4


class LineRefused(UserError):
    """A line of a file cannot be answered."""


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a line may have besides a prompt and fields of `SamplingConfig`."""

    id: str | int | None = None
    """Copied to its answer."""
    stop: str | tuple[str, ...] = ()
    """A text, or texts, that end the answer and are no part of it."""
    priority: int = 0
    """Of the lines under way, lower numbers go first."""


class Line(NamedTuple):
    """A prompt of a file."""

    where: str
    """The file and the line's number, for errors."""
    prompt: Sequence[int]
    sampling: SamplingConfig
    extras: Extras


@dataclasses.dataclass(frozen=True)
class Lines:
    """The lines of a JSONL file at any location, read anew each time they are iterated over.

    A line is an object with a `prompt`, a text or token ids, or the `messages` of a chat, whose
    contents are texts, and any fields of `SamplingConfig` and of `Extras`. Its `logit_bias` may be
    an object too, as OpenAI's is.
    """

    url: str
    tokenizer: Tokenizer
    sampling: SamplingConfig
    """What a line gets that says nothing else; each line after the first adds 1 to the seed."""
    vocab_size: int
    max_seq_len: int

    def count(self) -> int:
        """Returns how many there are, and has checked all of them.

        Raises:
            UserError: there are none, or what is wrong with one, and its number.
        """
        if not (number := sum(1 for _ in self)):
            raise UserError(f"{self.url} has no lines; give JSONL with prompts or messages")
        return number

    def __iter__(self) -> Iterator[Line]:
        """Yields lines as they are read; blank ones are left out."""
        at = 0
        with sources.open_bytes(self.url) as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield self._read(text, f"{self.url}:{number}", at)
                    at += 1

    def _read(self, text: bytes, where: str, at: int) -> Line:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LineRefused(f"{where} is not JSON ({error}); correct or remove it") from None
        if not isinstance(record, dict) or len(record.keys() & {"prompt", "messages"}) != 1:
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise LineRefused(f"{where} has {keys or 'nothing'}; give it either prompt or messages")
        try:
            prompt = self._prompt(record, where)
            rest = {k: v for k, v in record.items() if k not in ("prompt", "messages")}
            names = rest.keys() & {field.name for field in dataclasses.fields(Extras)}
            extras = fields.from_json(Extras, {name: rest.pop(name) for name in names})
            if isinstance(bias := rest.get("logit_bias"), dict):
                ids = [int(token) if token.isdecimal() else token for token in bias]
                rest["logit_bias"] = list(zip(ids, bias.values(), strict=True))
            given = fields.to_json(self.sampling) | {"seed": (self.sampling.seed + at) % 2**32}
            sampling = fields.from_json(SamplingConfig, given | rest)
            sizes = {"vocab_size": self.vocab_size, "max_seq_len": self.max_seq_len}
            check_prompt("the prompt", prompt, sampling.max_tokens, **sizes)
            check_bias(sampling, self.vocab_size)
        except UserError as error:
            _refuse(where, error)
        return Line(where, prompt, sampling, extras)

    def _prompt(self, record: dict[str, Any], where: str) -> Sequence[int]:
        if "messages" in record:
            # Not the tools that a conversation to train on may have.
            messages = check_conversation({"messages": record["messages"]}, "messages", where)
            return encode_prompt(self.tokenizer, messages.messages)
        prompt = record["prompt"]
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise UserError("prompt has half of a surrogate pair; correct it") from None
            return self.tokenizer.encode_prompt(prompt)
        if not isinstance(prompt, list) or set(map(type, prompt)) - {int}:
            raise UserError(f"prompt is {str(prompt)[:40]!r}; give a text or token ids")
        return prompt


def check_output(url: str) -> None:
    """Checks that no file is there yet.

    Raises:
        UserError: one is.
    """
    if sources.exists(url):
        raise UserError(f"{url} exists; give --output another name, or remove it")


def answer_lines(
    engine: Engine, lines: Iterable[Line], output: str, *, total: int, stop_ids: Sequence[int] = ()
) -> None:
    """Answers lines into a JSONL file, each as soon as it and those before it are done.

    An answer is an object with the line's `id`, if it has one, `text`, `finish_reason`,
    `prompt_tokens` and `completion_tokens`, and with `logprobs` if the line asks for them.

    Args:
        engine: with a tokenizer.
        lines: read no further than the engine is busy.
        output: at any location.
        total: of lines, for the progress bar.
        stop_ids: tokens that end an answer, besides the tokenizer's end of text.

    Raises:
        UserError: a line cannot be answered, once those before it are; or the file not written.
            What is done stays there.
    """
    ahead = LINES_AHEAD * engine.config.max_num_seqs
    flying: deque[tuple[Line, Answer]] = deque()
    done, refused = 0, None
    with sources.writing(output) as file, progress("answering", total, in_bytes=False) as show:

        def finish() -> None:
            nonlocal done
            _write(file, *flying[0])
            flying.popleft()
            show(done := done + 1)

        try:
            try:
                for line in lines:
                    while (answer := _submit(engine, line, stop_ids, wait=bool(flying))) is None:
                        finish()
                    flying.append((line, answer))
                    if len(flying) == ahead:
                        finish()
            except LineRefused as error:
                refused = error
            while flying:
                finish()
        except BaseException:
            for _, answer in flying:
                answer.cancel()
            raise
    if refused is not None:
        raise refused


def _submit(engine: Engine, line: Line, stop_ids: Sequence[int], *, wait: bool) -> Answer | None:
    """Returns a line's answer to come, or None if it has to `wait` for others."""
    try:
        more = {"stop": line.extras.stop, "priority": line.extras.priority}
        return engine.submit(line.prompt, line.sampling, stop_ids=stop_ids, **more)
    except QueueFull as error:
        if not wait:
            _refuse(line.where, error)
        return None
    except UserError as error:
        _refuse(line.where, error)


def _write(file: Any, line: Line, answer: Answer) -> None:
    piece = answer.result()
    record: dict[str, Any] = {
        **({} if line.extras.id is None else {"id": line.extras.id}),
        "text": piece.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(line.prompt),
        "completion_tokens": len(piece.tokens),
    }
    if line.sampling.logprobs is not None:
        record["logprobs"] = [
            {"token": token, "logprob": each.logprob, "top": each.top}
            for token, each in zip(piece.tokens, piece.logprobs, strict=True)
        ]
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    # So that who reads along sees it; a store takes whole blocks.
    file.flush()


def _refuse(where: str, error: UserError) -> NoReturn:
    said = str(error)
    raise LineRefused(said if said.startswith(where) else f"{where}: {said}") from None
