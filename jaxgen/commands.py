"""The subcommands of `jaxgen`: their options, the configs they take, and what each does.

Modules are imported where a command needs them, so that help and mistakes answer at once.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from jaxgen.bench_commands import BENCHMARKS
from jaxgen.command import Command, join
from jaxgen.errors import UserError
from jaxgen.options import CONFIG, DIR, FILE, MODEL, OPTIONS


def _train(args: argparse.Namespace, config: Any) -> None:
    join()
    from jaxgen.train.loop import train

    train(config, args.run_dir or str(Path("runs") / config.name))


def _generate(args: argparse.Namespace, config: Any) -> None:
    if args.input is not None or args.output is not None:
        return _answer_file(args, config)
    if args.prompt is None and sys.stdin.isatty():
        raise UserError("no prompt; give --prompt TEXT, or a text on standard input")
    prompts = args.prompt or [sys.stdin.read()]
    join()
    import jax

    from jaxgen.fit import fitting_mesh
    from jaxgen.pretrained import load_model
    from jaxgen.serve.generate import generate_text

    if args.chat:
        from jaxgen.data.chat import encode_prompt

        # A template that cannot be rendered is known before weights are read.
        for prompt in prompts:
            encode_prompt(args.model.tokenizer(), [{"role": "user", "content": prompt}])
    sampling, stop_ids = _sampling(args), args.model.generation.stop_ids
    # Draws depend on the seed and the position alone: with one seed, all texts would be alike.
    samplings = [dataclasses.replace(sampling, seed=args.seed + row) for row in range(len(prompts))]
    mesh = fitting_mesh(config)
    model, tokenizer = load_model(args.model, config, mesh)
    more = {"chat": args.chat, "draft": _load_draft(args, config, mesh), "donate": True}
    with jax.set_mesh(mesh):
        completions = generate_text(model, tokenizer, prompts, samplings, stop_ids, **more)
    for prompt, completion in zip(prompts, completions, strict=True):
        print(completion if args.chat else prompt + completion)


def _answer_file(args: argparse.Namespace, config: Any) -> None:
    if args.input is None or args.output is None:
        raise UserError("--input and --output go together: prompts in one file, answers in another")
    if args.prompt is not None or args.chat:
        raise UserError("--input takes no --prompt and no --chat; a line's messages are a chat")
    from jaxgen.serve.offline import Lines, answer_lines, check_output

    check_output(args.output)
    sizes = {"vocab_size": config.model.vocab_size, "max_seq_len": config.model.max_seq_len}
    lines = Lines(args.input, args.model.tokenizer(), _sampling(args), **sizes)
    total = lines.count()
    join()

    from jaxgen.fit import fitting_mesh
    from jaxgen.pretrained import load_model
    from jaxgen.serve.config import EngineConfig
    from jaxgen.serve.engine import Engine
    from jaxgen.serve.generate import MAX_NUM_SEQS

    mesh = fitting_mesh(config)
    model, tokenizer = load_model(args.model, config, mesh)
    draft = _load_draft(args, config, mesh)
    settings = EngineConfig(
        max_num_seqs=min(total, MAX_NUM_SEQS), speculation="draft" if draft else "off"
    )
    with Engine(model, tokenizer, settings, draft=draft, donate=True) as engine:
        stop_ids = args.model.generation.stop_ids
        answer_lines(engine, lines, args.output, total=total, stop_ids=stop_ids)


def _sampling(args: argparse.Namespace) -> Any:
    """How tokens are chosen: as the options say, or the model's makers do, or by default."""
    from jaxgen.serve.request import SamplingConfig

    chosen = {}
    for field in dataclasses.fields(SamplingConfig):
        for who in (args, args.model.generation):
            if (said := getattr(who, field.name, None)) is not None:
                chosen.setdefault(field.name, said)
    return SamplingConfig(**chosen)


def _load_draft(args: argparse.Namespace, config: Any, mesh: Any) -> Any:
    """Returns the model of `--draft`, split as the other is; None without."""
    if args.draft is None:
        return None
    from jaxgen.pretrained import load_model, open_model

    found = open_model(args.draft)
    given = found.serve_config(config.mesh)
    return load_model(found, dataclasses.replace(given, rules=config.rules), mesh)[0]


def _serve(args: argparse.Namespace, config: Any) -> int:
    from jaxgen.serve import keys

    api_keys = keys.read_keys(args.api_key_file or (), os.environ)
    admin_keys = keys.read_keys(
        args.admin_key_file or (),
        os.environ,
        option="--admin-key-file",
        variable=keys.ADMIN_VARIABLE,
    )
    join()

    from jaxgen.fit import fitting_mesh
    from jaxgen.pretrained import load_model
    from jaxgen.serve.engine import Engine
    from jaxgen.serve.schema import Served

    try:
        from jaxgen.serve.admin import describe
        from jaxgen.serve.server import serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"jaxgen serve needs {error.name}; install it with: pip install 'jaxgen[serve]'"
        ) from None
    name = args.name or Path(args.source).name
    mesh = fitting_mesh(config)
    settings = config.engine
    if args.draft is not None and "engine.speculation" not in args.overrides:
        settings = dataclasses.replace(settings, speculation="draft")

    def start() -> tuple[Served, Engine]:
        began = time.monotonic()
        _say(f"reading {args.source}")
        version = args.model.fingerprint
        model, tokenizer = load_model(args.model, config, mesh)
        draft = _load_draft(args, config, mesh)
        read_s = time.monotonic() - began
        _say(f"compiling, after {read_s:.1f} s")
        engine = Engine(
            model, tokenizer, settings, draft=draft, weight_version=version, donate=True
        )
        compilations = engine.stats().compilations
        _say(f"{compilations} programs compiled, ready after {time.monotonic() - began:.1f} s")
        return describe(name, args.model, engine), engine

    return serve(name, start, host=args.host, port=args.port, keys=api_keys, admin_keys=admin_keys)


def _say(text: str) -> None:
    print("jaxgen:", text, file=sys.stderr, flush=True)


def _convert_from_gguf(args: argparse.Namespace, config: Any) -> None:
    from jaxgen.formats.gguf import convert

    print(convert(args.source, args.outputs[0], args.dtype or "float32"))


def _eval(args: argparse.Namespace, config: Any) -> None:
    if args.data is None:
        raise UserError(f"no data; give --data FILE.jsonl: {OPTIONS['--data']['help']}")
    from jaxgen.eval.tasks import evaluate, read_records, table

    records = read_records(args.data, args.limit)
    join()
    import jax

    from jaxgen.eval.score import Scorer
    from jaxgen.fit import fitting_mesh
    from jaxgen.pretrained import load_model

    mesh = fitting_mesh(config)
    model, tokenizer = load_model(args.model, config, mesh)
    with jax.set_mesh(mesh):
        dtype = args.overrides.get("compute.dtype")
        scorer = Scorer(model, batch_size=args.batch_size, dtype=dtype)
        results = evaluate(scorer, tokenizer, records)
    if jax.process_index() == 0:
        print(json.dumps(results) if args.json else table(results))


def _convert_to_hf(args: argparse.Namespace, config: Any) -> None:
    join()
    import jax

    from jaxgen.fit import fitting_mesh
    from jaxgen.pretrained import check_empty, load_model

    (location,) = args.outputs
    if jax.process_index() == 0:
        check_empty(location)
    if args.adapter:
        if args.dtype:
            raise UserError("--adapter is written as it was trained, in float32; leave --dtype out")
        args.model.write_adapter(location)
        return
    model, _ = load_model(args.model, config, fitting_mesh(config))
    args.model.write(location, model, args.dtype)


def _data_pack(args: argparse.Namespace, config: Any) -> None:
    from jaxgen.data.show import pack

    print(pack(config.data, config.train.seq_len))


def _data_show(args: argparse.Namespace, config: Any) -> None:
    from jaxgen.data.show import show

    print(show(config.data, config.train.seq_len, config.train.batch_size, args.step))


def _doctor(args: argparse.Namespace, config: Any) -> int:
    join()
    from jaxgen.doctor import examine

    return 0 if examine() else 1


SAMPLING = (
    *("--max-tokens", "--min-tokens", "--temperature", "--top-k", "--top-p", "--min-p"),
    *("--presence-penalty", "--frequency-penalty", "--repetition-penalty", "--seed"),
)
COMMANDS: dict[str, Command] = {
    "train": Command("Trains a model, or resumes its run.", _train, CONFIG, ("--run-dir",)),
    "generate": Command(
        "Continues texts with a trained model.",
        _generate,
        MODEL,
        ("--prompt", "--chat", "--input", "--output", *SAMPLING, "--draft"),
    ),
    "serve": Command(
        "Serves a model over HTTP, as OpenAI does.",
        _serve,
        MODEL,
        ("--host", "--port", "--name", "--api-key-file", "--admin-key-file", "--draft"),
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
    **BENCHMARKS,
    "doctor": Command(
        "Checks kernels, collectives and meshes on these devices.", _doctor, "", (), lambda: None
    ),
}
