"""The subcommands of `jaxgen`: their options, the configs they take, and what each does.

Modules are imported where a command needs them, so that help and mistakes answer at once.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxgen import fields
from jaxgen.errors import UserError
from jaxgen.options import CONFIG, DIR, FILE, MODEL, OPTIONS


class Command(NamedTuple):
    """One subcommand: what it does with which config, and its own options."""

    summary: str
    run: Callable[[argparse.Namespace, Any], int | None]
    """Returns the exit code where it is not 0."""
    source: str
    """CONFIG, MODEL or FILE; empty if there is nothing to give."""
    options: tuple[str, ...]
    default: Callable[[], Any] | None = None
    """Makes the config where no source is given; None if one must be."""
    outputs: tuple[str, ...] = ()
    """What is given after the source: DIR."""
    serves: bool = False
    """Whether the config also says how an engine deals with many requests."""

    @property
    def usage(self) -> str:
        """What stands after its name: `CONFIG [options]`."""
        source = f"[{self.source}]" if self.source and self.default else self.source
        return " ".join(filter(None, (source, *self.outputs, "[options]")))


def load(command: Command, args: argparse.Namespace, overrides: dict[str, str]) -> Any:
    """Returns the config that a command was asked to run with; a MODEL is left in `args.model`."""
    path = args.source
    if command.source == FILE:
        return fields.override(None, overrides)
    if path is None:
        assert command.default is not None
        return fields.override(command.default(), overrides)
    from jaxgen import config

    if command.source == CONFIG:
        if "init" not in overrides:
            return config.load_config(path, overrides)
        from jaxgen.train.origin import start_from

        rest = dict(overrides)
        init = rest.pop("init")
        given = start_from(config.load_config(path), init)
        note = f"jaxgen: the model and the tokenizer of {path} give way to those of {init}"
        print(note, file=sys.stderr)
        return fields.override(given, rest)
    from jaxgen.pretrained import open_model

    args.model = open_model(path)
    # Not the mesh it was trained on, which may not be here; any other gives the same text.
    found = args.model.serve_config()
    if command.serves:
        from jaxgen.serve.server_config import ServerConfig

        found = ServerConfig(found.model, found.mesh, found.rules, found.compute)
    return fields.override(found, overrides)


def _start() -> None:
    """Turns the compilation cache on and joins the other processes of the run."""
    from jaxgen.compiler import enable_compilation_cache
    from jaxgen.distributed import initialize

    enable_compilation_cache()
    initialize(os.environ)


def _train(args: argparse.Namespace, config: Any) -> None:
    _start()
    from jaxgen.train.loop import train

    train(config, args.run_dir or str(Path("runs") / config.name))


def _generate(args: argparse.Namespace, config: Any) -> None:
    if args.prompt is None and sys.stdin.isatty():
        raise UserError("no prompt; give --prompt TEXT, or a text on standard input")
    prompts = args.prompt or [sys.stdin.read()]
    _start()
    import jax

    from jaxgen.pretrained import load_model
    from jaxgen.serve.generate import generate_text
    from jaxgen.serve.request import SamplingConfig
    from jaxgen.sharding import make_mesh

    if args.chat:
        from jaxgen.data.chat import template_of

        template_of(args.model.tokenizer())
    defaults, chosen = args.model.generation, {}
    for field in dataclasses.fields(SamplingConfig):
        for source in (args, defaults):
            said = getattr(source, field.name, None)
            if said is not None:
                chosen.setdefault(field.name, said)
    sampling = SamplingConfig(**chosen)
    # Draws depend on the seed and the position alone: with one seed, all texts would be alike.
    samplings = [dataclasses.replace(sampling, seed=args.seed + row) for row in range(len(prompts))]
    mesh = make_mesh(config.mesh)
    model, tokenizer = load_model(args.model, config, mesh)
    more = {"chat": args.chat, "draft": _load_draft(args, config, mesh)}
    with jax.set_mesh(mesh):
        completions = generate_text(model, tokenizer, prompts, samplings, defaults.stop_ids, **more)
    for prompt, completion in zip(prompts, completions, strict=True):
        print(completion if args.chat else prompt + completion)


def _load_draft(args: argparse.Namespace, config: Any, mesh: Any) -> Any:
    """Returns the model of `--draft`, split as the other is; None without."""
    if args.draft is None:
        return None
    from jaxgen.pretrained import load_model, open_model

    found = open_model(args.draft)
    given = found.serve_config(config.mesh)
    return load_model(found, dataclasses.replace(given, rules=config.rules), mesh)[0]


def _serve(args: argparse.Namespace, config: Any) -> int:
    from jaxgen.serve.keys import read_keys

    keys = read_keys(args.api_key_file or (), os.environ)
    _start()
    import jax

    from jaxgen.pretrained import load_model
    from jaxgen.serve.engine import Engine
    from jaxgen.serve.request import SamplingConfig
    from jaxgen.serve.schema import Served
    from jaxgen.sharding import make_mesh

    try:
        from jaxgen.serve.server import serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"jaxgen serve needs {error.name}; install it with: pip install 'jaxgen[serve]'"
        ) from None
    name = args.name or Path(args.source).name
    said = args.model.generation
    # Where the model's makers say nothing, OpenAI's defaults.
    defaults = SamplingConfig(
        temperature=1.0 if said.temperature is None else said.temperature,
        top_k=said.top_k or 0,
        top_p=1.0 if said.top_p is None else said.top_p,
        min_p=said.min_p or 0.0,
        repetition_penalty=said.repetition_penalty or 1.0,
    )
    mesh = make_mesh(config.mesh)
    settings = config.engine
    if args.draft is not None and "engine.speculation" not in args.overrides:
        settings = dataclasses.replace(settings, speculation="draft")

    def start() -> tuple[Served, Engine]:
        model, tokenizer = load_model(args.model, config, mesh)
        draft = _load_draft(args, config, mesh)
        with jax.set_mesh(mesh):
            engine = Engine(model, tokenizer, settings, draft=draft)
        served = Served(
            name=name,
            tokenizer=tokenizer,
            vocab_size=config.model.vocab_size,
            max_seq_len=engine.max_seq_len,
            stop_ids=said.stop_ids,
            defaults=defaults,
            max_requests=config.engine.max_queued_requests,
        )
        return served, engine

    return serve(name, start, host=args.host, port=args.port, keys=keys)


def _convert_from_gguf(args: argparse.Namespace, config: Any) -> None:
    from jaxgen.formats.gguf import convert

    print(convert(args.source, args.outputs[0], args.dtype or "float32"))


def _eval(args: argparse.Namespace, config: Any) -> None:
    if args.data is None:
        raise UserError(f"no data; give --data FILE.jsonl: {OPTIONS['--data']['help']}")
    from jaxgen.eval.tasks import evaluate, read_records, table

    records = read_records(args.data, args.limit)
    _start()
    import jax

    from jaxgen.eval.score import Scorer
    from jaxgen.pretrained import load_model
    from jaxgen.sharding import make_mesh

    mesh = make_mesh(config.mesh)
    model, tokenizer = load_model(args.model, config, mesh)
    with jax.set_mesh(mesh):
        dtype = args.overrides.get("compute.dtype")
        scorer = Scorer(model, batch_size=args.batch_size, dtype=dtype)
        results = evaluate(scorer, tokenizer, records)
    if jax.process_index() == 0:
        print(json.dumps(results) if args.json else table(results))


def _convert_to_hf(args: argparse.Namespace, config: Any) -> None:
    _start()
    import jax

    from jaxgen.pretrained import check_empty, load_model
    from jaxgen.sharding import make_mesh

    (location,) = args.outputs
    if jax.process_index() == 0:
        check_empty(location)
    if args.adapter:
        args.model.write_adapter(location)
        return
    model, _ = load_model(args.model, config, make_mesh(config.mesh))
    args.model.write(location, model, args.dtype)


def _data_pack(args: argparse.Namespace, config: Any) -> None:
    from jaxgen.data.show import pack

    print(pack(config.data, config.train.seq_len))


def _data_show(args: argparse.Namespace, config: Any) -> None:
    from jaxgen.data.show import show

    print(show(config.data, config.train.seq_len, config.train.batch_size, args.step))


def _bench_train(args: argparse.Namespace, config: Any) -> None:
    _start()
    import jax

    from jaxgen.train.bench import bench_train, process_start_s, table

    results = bench_train(config, args.steps, started_s=process_start_s())
    if jax.process_index() == 0:
        print(json.dumps(results) if args.json else table(results))


def _bench_collectives(args: argparse.Namespace, config: Any) -> None:
    _start()
    import jax

    from jaxgen.collectives import bench_collectives, table
    from jaxgen.sharding import make_mesh

    results = bench_collectives(
        make_mesh(config.mesh),
        min_bytes=args.min_bytes,
        max_bytes=args.max_bytes,
        dtype=args.dtype or "bfloat16",
        iterations=args.iterations,
    )
    if jax.process_index() == 0:
        print(json.dumps(results) if args.json else table(results))


def _collectives_config() -> Any:
    from jaxgen.collectives import CollectivesConfig

    return CollectivesConfig()


def _doctor(args: argparse.Namespace, config: Any) -> int:
    _start()
    from jaxgen.doctor import examine

    return 0 if examine() else 1


SAMPLING = (
    *("--prompt", "--chat", "--max-tokens", "--min-tokens"),
    *("--temperature", "--top-k", "--top-p", "--min-p"),
    *("--presence-penalty", "--frequency-penalty", "--repetition-penalty", "--seed"),
)
COMMANDS = {
    "train": Command("Trains a model, or resumes its run.", _train, CONFIG, ("--run-dir",)),
    "generate": Command(
        "Continues texts with a trained model.", _generate, MODEL, (*SAMPLING, "--draft")
    ),
    "serve": Command(
        "Serves a model over HTTP, as OpenAI does.",
        _serve,
        MODEL,
        ("--host", "--port", "--name", "--api-key-file", "--draft"),
        serves=True,
    ),
    "eval": Command(
        "Measures a trained model on questions with choices, or on texts.",
        _eval,
        MODEL,
        ("--data", "--limit", "--batch-size", "--json"),
    ),
    "convert from-gguf": Command(
        "Writes a GGUF file as a Hugging Face folder.",
        _convert_from_gguf,
        FILE,
        ("--dtype",),
        outputs=(DIR,),
    ),
    "convert to-hf": Command(
        "Writes a model as a Hugging Face folder.",
        _convert_to_hf,
        MODEL,
        ("--dtype", "--adapter"),
        outputs=(DIR,),
    ),
    "data pack": Command("Tokenises and packs the data, once.", _data_pack, CONFIG, ()),
    "data show": Command("Shows what the model sees.", _data_show, CONFIG, ("--step",)),
    "bench train": Command(
        "Times the start and the training step.", _bench_train, CONFIG, ("--steps", "--json")
    ),
    "bench collectives": Command(
        "Times collectives over every mesh axis.",
        _bench_collectives,
        CONFIG,
        ("--min-bytes", "--max-bytes", "--dtype", "--iterations", "--json"),
        _collectives_config,
    ),
    "doctor": Command(
        "Checks kernels, collectives and meshes on these devices.", _doctor, "", (), lambda: None
    ),
}
