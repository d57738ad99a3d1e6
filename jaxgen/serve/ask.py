"""From the body of a request to what the engine is asked for."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgen.data import chat
from jaxgen.data.spelling import Spelling
from jaxgen.errors import UserError
from jaxgen.serve import schema
from jaxgen.serve.body import Refused, check, parse
from jaxgen.serve.grammar import Constraint
from jaxgen.serve.messages import plain
from jaxgen.serve.request import SamplingConfig, check_prompt
from jaxgen.serve.schema import Served
from jaxgen.serve.structure import check_offer, constraint_of, offered

# OpenAI's, of /v1/completions.
DEFAULT_MAX_TOKENS = 16


class NoSuchModel(Refused):
    """A body names a model that is not served."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """The answers that one body asks for, and how to give them."""

    prompts: list[Sequence[int]]
    """One for each choice, in the order of their indices."""
    samplings: list[SamplingConfig]
    echoes: list[str]
    """What stands before the text of each."""
    stop: list[str]
    """An answer ends before the first of these texts."""
    stop_ids: list[int]
    ignore_eos: bool
    """Whether to go on after the tokenizer's end of text."""
    priority: int
    """Lower goes first."""
    constraints: list[Constraint | None]
    """What holds each answer to a grammar."""
    tools: Sequence[Mapping[str, Any]]
    """What the model may call."""
    spelling: Spelling | None
    """How single tokens are shown; None if no log-probabilities are asked for."""
    shown: Mapping[int, str]
    """Special tokens that the text of an answer has to show, by name."""
    prompt_tokens: int
    """Of all prompts, each counted once."""
    count: int
    """Answers to each prompt."""
    stream: bool
    include_usage: bool


def read(served: Served, path: str, body: bytes) -> dict[str, Any]:
    """Returns the body of a POST to a path, without what is null.

    Raises:
        Refused: it is not what the path takes.
    """
    given = parse(body)
    if isinstance(given, dict):
        name = given.get("model")
        if isinstance(name, str) and name != served.name:
            raise NoSuchModel(
                f"no such model; model={served.name!r} is the one that is served", "model"
            )
        if path == "/tokenize" and {"prompt", "messages"} <= given.keys():
            raise Refused("prompt and messages cannot both be had; leave one out", "messages")
    check(given, schema.BODIES[path](served))
    return {name: value for name, value in given.items() if value is not None}


def ask_completion(served: Served, body: bytes) -> Ask:
    """Returns what a body to /v1/completions asks for.

    Raises:
        Refused: it cannot be done.
    """
    given = read(served, "/v1/completions", body)
    if given.get("echo") and "logprobs" in given:
        raise Refused("logprobs of an echo are not supported; leave one out", "logprobs")
    if "best_of" in given and given.get("n", 1) > 1:
        raise Refused("best_of=1 is less than n; leave it out", "best_of")
    prompt = given["prompt"]
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = [prompt] if single else prompt
    tokenizer = served.tokenizer
    tokens = [tokenizer.encode_prompt(p) if isinstance(p, str) else p for p in prompts]
    echoes = [""] * len(prompts)
    if given.get("echo"):
        echoes = [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts]
    names = ["prompt"] if single else [f"prompt[{i}]" for i in range(len(prompts))]
    return _ask(served, given, names, tokens, echoes, given.get("max_tokens", DEFAULT_MAX_TOKENS))


def ask_chat(served: Served, body: bytes) -> Ask:
    """Returns what a body to /v1/chat/completions asks for.

    Raises:
        Refused: it cannot be done.
    """
    given = read(served, "/v1/chat/completions", body)
    limits = {given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}
    if len(limits) > 1:
        raise Refused("max_tokens differs from max_completion_tokens; send one", "max_tokens")
    if given.get("top_logprobs") is not None and not given.get("logprobs"):
        raise Refused("top_logprobs is for logprobs=true; leave it out", "top_logprobs")
    given["logprobs"] = given.get("top_logprobs", 0) if given.get("logprobs") else None
    tokens = encode_messages(served, given)
    room = max(served.max_seq_len - len(tokens), 1)
    return _ask(served, given, ["messages"], [tokens], [""], min(limits, default=room))


def encode_messages(served: Served, given: Mapping[str, Any]) -> list[int]:
    """Returns the ids from which the model answers the conversation in a body.

    Raises:
        Refused: the model has no chat template, or the template refuses the conversation.
    """
    check_offer(given)
    said, told, blame = plain(given["messages"]), None, "messages"
    tools = given.get("tools", ())
    try:
        if tools or any("tool_calls" in m or m["role"] == "tool" for m in said):
            blame = "tools" if tools else "messages"
            form, blame = served.tool_format, "messages"
            said, told = form.prompt(said, tools, given.get("tool_choice", "auto"))
        return chat.encode_prompt(served.tokenizer, said, tools=told)
    except UserError as error:
        raise Refused(str(error), blame) from None


def tokenize(served: Served, body: bytes) -> list[int]:
    """Returns the ids that a body to /tokenize asks for.

    Raises:
        Refused: it cannot be done.
    """
    given = read(served, "/tokenize", body)
    if "messages" in given:
        return encode_messages(served, given)
    if given.get("add_special_tokens", True):
        return served.tokenizer.encode_prompt(given["prompt"])
    return served.tokenizer.encode(given["prompt"], special=True)


def detokenize(served: Served, body: bytes) -> str:
    """Returns the text that a body to /detokenize asks for, special tokens by their names.

    Raises:
        Refused: it cannot be done.
    """
    return served.tokenizer.decode(read(served, "/detokenize", body)["tokens"], special=True)


def _ask(
    served: Served,
    given: Mapping[str, Any],
    names: Sequence[str],
    prompts: Sequence[Sequence[int]],
    echoes: Sequence[str],
    max_tokens: int,
) -> Ask:
    stream, count = given.get("stream", False), given.get("n", 1)
    if "stream_options" in given and not stream:
        raise Refused("stream_options is for stream=true; leave it out", "stream_options")
    blame = "n" if count > 1 else names[0].partition("[")[0]
    if len(prompts) * count > served.max_requests:
        raise Refused(
            f"{len(prompts)} prompts with n={count} are more than the {served.max_requests} "
            "answers that may wait here; send fewer at once",
            blame,
        )
    size = sum(map(len, prompts)) * count
    if size > served.max_prompt_tokens:
        raise Refused(
            f"prompts of {size} tokens, with n={count}, are more than the "
            f"{served.max_prompt_tokens} that may wait here; send fewer at once",
            blame,
        )
    for name, prompt in zip(names, prompts, strict=True):
        try:
            check_prompt(
                name,
                prompt,
                max_tokens,
                vocab_size=served.vocab_size,
                max_seq_len=served.max_seq_len,
            )
        except UserError as error:
            raise Refused(str(error), name) from None
    tools = offered(given)
    constraint, ignore_eos = constraint_of(served, given), given.get("ignore_eos", False)
    sampling, stop = _sampling(served, given, max_tokens), given.get("stop", [])
    seed = given.get("seed", secrets.randbits(32))
    return Ask(
        prompts=[prompt for prompt in prompts for _ in range(count)],
        samplings=[
            dataclasses.replace(sampling, seed=(seed + at) % 2**32)
            for at in range(len(prompts) * count)
        ],
        echoes=[echo for echo in echoes for _ in range(count)],
        stop=[stop] if isinstance(stop, str) else stop,
        stop_ids=[*given.get("stop_token_ids", ()), *(() if ignore_eos else served.stop_ids)],
        ignore_eos=ignore_eos,
        priority=given.get("priority", 0),
        constraints=[constraint and constraint.fresh() for _ in range(len(prompts) * count)],
        tools=tools,
        spelling=_spelling(served, given),
        shown=served.tool_format.special if tools else {},
        prompt_tokens=sum(map(len, prompts)),
        count=count,
        stream=stream,
        include_usage=given.get("stream_options", {}).get("include_usage") or False,
    )


def _spelling(served: Served, given: Mapping[str, Any]) -> Spelling | None:
    if given.get("logprobs") is None:
        return None
    try:
        return served.spelling
    except UserError as error:
        raise Refused(str(error), "logprobs") from None


def _sampling(served: Served, given: Mapping[str, Any], max_tokens: int) -> SamplingConfig:
    d, least = served.defaults, given.get("min_tokens", 0)
    if least > max_tokens:
        raise Refused(f"min_tokens={least} is more than {max_tokens=}; lower it", "min_tokens")
    bias = {int(token): float(value) for token, value in given.get("logit_bias", {}).items()}
    if wrong := [token for token in bias if token >= served.vocab_size]:
        raise Refused(
            f"logit_bias has token {wrong[0]}: expected 0 to {served.vocab_size - 1}", "logit_bias"
        )
    return dataclasses.replace(
        d,
        temperature=float(given.get("temperature", d.temperature)),
        top_p=float(given.get("top_p", d.top_p)),
        min_p=float(given.get("min_p", d.min_p)),
        repetition_penalty=float(given.get("repetition_penalty", d.repetition_penalty)),
        max_tokens=max_tokens,
        top_k=max(given.get("top_k", d.top_k), 0),
        presence_penalty=float(given.get("presence_penalty", 0)),
        frequency_penalty=float(given.get("frequency_penalty", 0)),
        logit_bias=tuple(sorted(bias.items())),
        min_tokens=least,
        logprobs=given.get("logprobs"),
    )
