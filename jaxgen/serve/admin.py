"""What only whoever runs a server may ask of it: other weights."""

import time
from typing import Any

from jaxgen.errors import UserError
from jaxgen.pretrained import Pretrained, open_model
from jaxgen.serve.body import check, parse, record
from jaxgen.serve.engine import Engine
from jaxgen.serve.request import SamplingConfig
from jaxgen.serve.schema import Served

_LOCATION = {"type": "string", "minLength": 1}
_RELOAD = record({"model": _LOCATION, "draft": _LOCATION}, ["model"])


def describe(name: str, source: Pretrained, engine: Engine) -> Served:
    """Returns what requests need to know of a model: where its makers say nothing, as OpenAI does.

    Args:
        name: in requests.
        source: of the weights.
        engine: that serves them.
    """
    said = source.generation
    defaults = SamplingConfig(
        temperature=1.0 if said.temperature is None else said.temperature,
        top_k=said.top_k or 0,
        top_p=1.0 if said.top_p is None else said.top_p,
        min_p=said.min_p or 0.0,
        repetition_penalty=said.repetition_penalty or 1.0,
    )
    return Served(
        name=name,
        tokenizer=source.tokenizer(),
        vocab_size=source.config.vocab_size,
        max_seq_len=engine.max_seq_len,
        stop_ids=said.stop_ids,
        defaults=defaults,
        max_requests=engine.config.max_queued_requests,
        max_prompt_tokens=engine.config.max_queued_tokens,
    )


def locations_of(body: bytes) -> tuple[str, str | None]:
    """Returns where the weights are that a body asks for: {"model": LOCATION, "draft": LOCATION}.

    Without "draft", a draft model keeps its own.

    Raises:
        Refused: it is something else.
    """
    given = parse(body)
    check(given, _RELOAD)
    return given["model"], given.get("draft")


def reload(
    locations: tuple[str, str | None], name: str, engine: Engine
) -> tuple[Served, dict[str, Any]]:
    """Replaces the weights of an engine, and returns when the new ones serve.

    Args:
        locations: of a model, as `open_model` takes it, and of a draft model, if its weights are to
            be replaced, too.
        name: of the model in requests.
        engine: that serves it.

    Returns:
        What requests need to know of it now, and what to tell who has asked for it.

    Raises:
        UserError: it cannot be, and the old weights serve on.
    """
    location, draft = locations
    before, began = engine.weight_version, time.monotonic()
    try:
        source = open_model(location)
        described = describe(name, source, engine)
        done = engine.reload(source, draft=draft)
    except OSError as error:
        raise UserError(f"{location} cannot be read ({error}); make it readable") from None
    seconds = time.monotonic() - began
    print(
        f"reloaded: {location} as {done.weight_version} after {seconds:.1f} s, "
        f"of which nothing was computed for {done.pause_s:.3f} s",
        flush=True,
    )
    told: dict[str, Any] = {"previous_version": before, **done._asdict()}
    if engine.config.speculation == "draft":
        told["draft"] = "kept" if draft is None else "replaced"
    return described, told
