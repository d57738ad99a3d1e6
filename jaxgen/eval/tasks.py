"""Tasks as JSONL: questions with choices, or texts; and how well a model does on them."""

import json
import math
import re
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgen.data import sources
from jaxgen.data.tokenizer import Tokenizer, check_vocab
from jaxgen.errors import UserError
from jaxgen.eval.score import Scorer, encode_pair, prefix_token
from jaxgen.tables import columns

CONTEXTS = ("context", "question", "query", "ctx")
ANSWERS = ("answer", "label", "gold")


class Question(NamedTuple):
    """A context, of whose continuations one is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


class Text(NamedTuple):
    """A text to measure perplexity on."""

    text: str


Records = list[Question] | list[Text]


def read_records(url: str, limit: int | None = None) -> Records:
    """Returns the records of a JSONL file at any location, all of one kind.

    A question has its context in one of `CONTEXTS`, a list of texts in `choices`, and the right one
    in one of `ANSWERS`: its index from 0, its letter, or its text. A text is in `text`.

    Args:
        url: of the file.
        limit: records that are read at most.

    Raises:
        UserError: a record is neither, lacks something, or is of another kind than the first.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}; use at least 1")
    records: list[Any] = []
    for number, line in enumerate(sources.read_bytes(url).split(b"\n"), start=1):
        if not line.strip():
            continue
        record = _read(line, f"{url}:{number}")
        if records and type(record) is not type(records[0]):
            raise UserError(
                f"{url}:{number} is a {type(record).__name__.lower()} and the first record a "
                f"{type(records[0]).__name__.lower()}; put them in files of their own"
            )
        records.append(record)
        if len(records) == limit:
            break
    if not records:
        raise UserError(f"{url} has no records; give JSONL with choices or texts")
    return records


def evaluate(scorer: Scorer, tokenizer: Tokenizer, records: Records) -> dict[str, Any]:
    """Returns the measures of the records, each that is a mean with its standard error beside it.

    Of questions: `acc`, how often the right choice has the highest log-likelihood; `acc_norm`, the
    same of log-likelihoods a character of the choice; `acc_bytes`, a byte. A choice is scored after
    the context and a space, unless one of them brings white space. `truncated` counts the choices
    whose context was cut on the left, to what the model sees.

    Of texts: `loss`, the mean nats a token, the first one after the begin of text;
    `word_perplexity`, `byte_perplexity` and `bits_per_byte`, of which the first two are None where
    they are beyond all floats.

    Raises:
        UserError: the tokenizer has tokens that the model has not, or the scorer refuses.

    Source: the definitions are lm-eval's, of `multiple_choice` and `loglikelihood_rolling` tasks.
    """
    check_vocab(tokenizer, scorer.model.config.vocab_size)
    if isinstance(records[0], Question):
        return _answer([r for r in records if isinstance(r, Question)], scorer, tokenizer)
    return _read_texts([r.text for r in records if isinstance(r, Text)], scorer, tokenizer)


def table(results: dict[str, Any]) -> str:
    """Returns the results of `evaluate` as text."""

    def text(value: Any) -> str:
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    names = [name for name in results if not name.endswith("_stderr")]
    rows = [(name, text(results[name]), text(results.get(f"{name}_stderr"))) for name in names]
    return columns(("measure", "value", "stderr"), rows)


def _answer(questions: Sequence[Question], scorer: Scorer, tokenizer: Tokenizer) -> dict[str, Any]:
    requests = [
        encode_pair(tokenizer, question.context, _joined(question.context, choice))
        for question in questions
        for choice in question.choices
    ]
    scores = iter(scorer(requests))
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for _, choices, answer in questions:
        logliks = np.asarray([next(scores).loglik for _ in choices])
        characters = np.asarray([len(choice) for choice in choices])
        num_bytes = np.asarray([len(choice.encode()) for choice in choices])
        for name, per in (("acc", 1), ("acc_norm", characters), ("acc_bytes", num_bytes)):
            right[name].append(bool(np.argmax(logliks / per) == answer))
    results: dict[str, Any] = {"questions": len(questions)}
    for name, hits in right.items():
        results[name] = float(np.mean(hits))
        several = len(hits) > 1
        error = float(np.std(hits, ddof=1) / math.sqrt(len(hits))) if several else None
        results[f"{name}_stderr"] = error
    results["truncated"] = sum(
        len(request.context) + len(request.continuation) > scorer.max_seq_len + 1
        for request in requests
    )
    return results


def _joined(context: str, choice: str) -> str:
    """The choice as it follows the context: after a space, unless one of them brings its own."""
    return choice if context[-1:].isspace() or choice[:1].isspace() else f" {choice}"


def _read_texts(texts: Sequence[str], scorer: Scorer, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = [tokenizer.encode(text, special=True) for text in texts]
    nll = -math.fsum(scorer.rolling(ids, prefix_token(tokenizer)))
    num_bytes = sum(len(text.encode()) for text in texts)
    num_words = sum(len(re.split(r"\s+", text)) for text in texts)

    def perplexity(num: int) -> float | None:
        try:
            return math.exp(nll / num)
        except OverflowError:
            return None

    return {
        "texts": len(texts),
        "tokens": sum(map(len, ids)),
        "loss": nll / sum(map(len, ids)),
        "word_perplexity": perplexity(num_words),
        "byte_perplexity": perplexity(num_bytes),
        "bits_per_byte": nll / math.log(2) / num_bytes,
    }


def _read(line: bytes, where: str) -> Question | Text:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); correct or remove it") from None
    if not isinstance(record, dict) or not record.keys() & {"choices", "text"}:
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where} has neither 'choices' nor 'text' but {keys}; give one of them")
    if "choices" not in record:
        return Text(_text(record["text"], "text", where, empty=False))
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where}: choices={choices!r}; give a list of at least two texts")
    choices = tuple(_text(choice, "a choice", where, empty=False) for choice in choices)
    context = _text(_one_of(record, CONTEXTS, where), "the context", where, empty=True)
    return Question(context, choices, _index(_one_of(record, ANSWERS, where), choices, where))


def _one_of(record: dict[str, Any], names: Sequence[str], where: str) -> Any:
    found = [name for name in names if name in record]
    if len(found) != 1:
        what = " and ".join(found) or f"none of {', '.join(names)}"
        raise UserError(f"{where} has {what}; give one of them")
    return record[found[0]]


def _text(value: Any, name: str, where: str, *, empty: bool) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise UserError(f"{where}: {name} is {value!r}; give a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {name} holds half of a surrogate pair; correct it") from None
    return value


def _index(answer: Any, choices: Sequence[str], where: str) -> int:
    """The index that an answer stands for, whichever way it is said."""
    meant: set[int] = set()
    if isinstance(answer, int) and not isinstance(answer, bool):
        meant = {answer}
    elif isinstance(answer, str):
        meant = {i for i, choice in enumerate(choices) if choice == answer}
        if len(answer) == 1 and answer in string.ascii_uppercase:
            meant.add(string.ascii_uppercase.index(answer))
        if answer.isdecimal():
            meant.add(int(answer))
        meant &= set(range(len(choices)))
    if len(meant) != 1 or not meant <= set(range(len(choices))):
        what = "can mean several" if len(meant) > 1 else "is none"
        raise UserError(
            f"{where}: answer {answer!r} {what} of the {len(choices)} choices; "
            f"give its index from 0 to {len(choices) - 1}"
        )
    return meant.pop()
