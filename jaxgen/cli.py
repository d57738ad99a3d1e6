"""The `jaxgen` command: a config file, dotted overrides, help, and errors without tracebacks.

The effects live here: argv and the environment, the simulated devices, the distributed runtime and
the compilation cache. Modules are imported where a command needs them, so that help and mistakes
answer at once.
"""

import argparse
import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jaxgen import __version__, fields
from jaxgen.errors import UserError

# The user's machine, not our bug: no permission, no space, a read-only or vanished place.
ENVIRONMENT_ERRORS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
)

CONFIG = "CONFIG"
MODEL = "MODEL"


def _number(metavar: str, text: str, default: int | float) -> dict[str, Any]:
    help = f"{text} (default: {default})"
    return {"type": type(default), "default": default, "metavar": metavar, "help": help}


OPTIONS: dict[str, dict[str, Any]] = {
    CONFIG: {
        "metavar": "CONFIG.py[:name]",
        "help": "a Python file and the config in it (name: config); try configs/tiny.py",
    },
    MODEL: {
        "metavar": "MODEL",
        "help": "a run directory such as runs/tiny, or one of its checkpoints",
    },
    "--devices": {"type": int, "metavar": "N", "help": "simulate N CPU devices"},
    "--run-dir": {
        "metavar": "DIR",
        "help": "where the run lives (default: runs/NAME); the same command again resumes it",
    },
    "--prompt": {
        "action": "extend",
        "nargs": "+",
        "metavar": "TEXT",
        "help": "texts to continue, together in one batch (default: standard input)",
    },
    "--max-tokens": _number("N", "most new tokens per prompt", 128),
    "--temperature": _number("T", "divides the logits; 0 takes the likeliest token", 0.0),
    "--top-k": _number("K", "sample among the K likeliest tokens; 0 for all", 0),
    "--top-p": _number("P", "sample among the likeliest tokens that sum to probability P", 1.0),
    "--seed": _number("S", "of sampling; each prompt after the first adds 1", 0),
    "--step": _number("N", "the step whose batch is shown", 0),
    "--steps": _number("N", "training steps that are timed, after two that are not", 20),
    "--json": {"action": "store_true", "help": "print one JSON object"},
    "--min-bytes": _number("B", "the first size", 2**16),
    "--max-bytes": {
        "type": int,
        "metavar": "B",
        "help": "the last size, by factors of 4 (default: 67108864, on CPU 4194304)",
    },
    "--dtype": {
        "choices": ("bfloat16", "float32"),
        "default": "bfloat16",
        "help": "of the elements (default: bfloat16)",
    },
    "--iterations": _number("N", "timed runs of each, of which the median counts", 10),
}


class Command(NamedTuple):
    """One subcommand: what it does with which config, and its own options."""

    summary: str
    run: Callable[[argparse.Namespace, Any], int | None]
    """Returns the exit code where it is not 0."""
    source: str
    """CONFIG or MODEL; empty if there is nothing to give."""
    options: tuple[str, ...]
    default: Callable[[], Any] | None = None
    """Makes the config where no source is given; None if one must be."""

    @property
    def usage(self) -> str:
        """What stands after its name: `CONFIG [options]`."""
        source = f"[{self.source}]" if self.source and self.default else self.source
        return f"{source} [options]".lstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 or its own exit code, 2 for a user's error, 130 for Ctrl-C."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("jaxgen: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # `head` has all it wants; without this Python complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        place = error.filename or "writing a file"
        message = f"{place}: {error.strerror}; make room there or choose another place"
    print("jaxgen:", " ".join(message.split()), file=sys.stderr)
    return 2


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"jaxgen {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    nested = [command.split()[1] for command in COMMANDS if command.startswith(f"{name} ")]
    if nested:
        if rest and rest[0] in ("-h", "--help"):
            print(_overview(name))
            return 0
        if not rest or rest[0] not in nested:
            given = f", not {rest[0]!r}" if rest else ""
            raise UserError(f"jaxgen {name} takes {' or '.join(nested)}{given}")
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        hint = fields.did_you_mean(name, {command.split()[0] for command in COMMANDS})
        raise UserError(f"no command {name!r}{hint or '; see jaxgen --help'}")
    return _run(name, COMMANDS[name], rest) or 0


def _run(name: str, command: Command, argv: list[str]) -> int | None:
    parser = _Parser(f"jaxgen {name}", description=command.summary, allow_abbrev=False)
    source, options = command.source, [*command.options, "--devices"]
    parser.usage = f"{parser.prog} {command.usage}"
    if source:
        parser.usage += " [--field value ...]"
        parser.add_argument("source", nargs="?", **OPTIONS[source])
    for option in options:
        parser.add_argument(option, **OPTIONS[option])
    wants_help = "-h" in argv or "--help" in argv
    argv, overrides = _split([arg for arg in argv if arg not in ("-h", "--help")], options)
    args = parser.parse_args(argv, argparse.Namespace(source=None))
    needs_source = args.source is None and command.default is None
    if wants_help:
        print(parser.format_help())
        if needs_source:
            print(f"jaxgen {name} {source} --help shows the fields too, with their values.")
            return 0
    elif needs_source:
        raise UserError(
            f"jaxgen {name} needs {OPTIONS[source]['metavar']}: {OPTIONS[source]['help']}"
        )
    if args.devices is not None:
        from jaxgen.sharding import simulate_devices

        simulate_devices(args.devices)
    config = _load(command, args.source, overrides)
    if wants_help:
        print(_field_help(config))
        return 0
    return command.run(args, config)


def _split(argv: list[str], options: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--field value` and `--field=value` out of argv; what is not an option is a field."""
    rest, overrides = [], {}
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if not token.startswith("--") or name in options:
            rest.append(token)
            continue
        hint = "" if "." in name else fields.did_you_mean(name, options)
        if hint:
            raise UserError(f"no option {name}{hint}")
        value = value if equals else next(tokens, None)
        if value is None or (value.startswith("--") and not equals):
            raise UserError(f"{name} needs a value: {name} VALUE or {name}=VALUE")
        overrides[name[2:]] = value
    return rest, overrides


def _load(command: Command, path: str | None, overrides: dict[str, str]) -> Any:
    if path is None:
        assert command.default is not None
        return fields.override(command.default(), overrides)
    from jaxgen import config

    if command.source == CONFIG:
        return config.load_config(path, overrides)
    from jaxgen.serve.load import split_location
    from jaxgen.sharding import MeshConfig

    run_dir, _ = split_location(path)
    # The mesh it was trained on may not be here; any other gives the same text.
    trained = dataclasses.replace(config.read_config(run_dir), mesh=MeshConfig())
    return fields.override(trained, overrides)


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

    from jaxgen.serve.generate import generate_text
    from jaxgen.serve.load import load_model
    from jaxgen.serve.sampler import SamplingConfig
    from jaxgen.sharding import make_mesh

    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    sampling = SamplingConfig(**{name: getattr(args, name) for name in names})
    # Draws depend on the seed and the position alone: with one seed, all texts would be alike.
    samplings = [dataclasses.replace(sampling, seed=args.seed + row) for row in range(len(prompts))]
    mesh = make_mesh(config.mesh)
    model, tokenizer = load_model(args.source, config, mesh)
    with jax.set_mesh(mesh):
        completions = generate_text(model, tokenizer, prompts, samplings)
    for prompt, completion in zip(prompts, completions, strict=True):
        print(prompt + completion)


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
        dtype=args.dtype,
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


SAMPLING = ("--prompt", "--max-tokens", "--temperature", "--top-k", "--top-p", "--seed")
COMMANDS = {
    "train": Command("Trains a model, or resumes its run.", _train, CONFIG, ("--run-dir",)),
    "generate": Command("Continues texts with a trained model.", _generate, MODEL, SAMPLING),
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


def _start() -> None:
    """Turns the compilation cache on and joins the other processes of the run."""
    from jaxgen.compiler import enable_compilation_cache
    from jaxgen.distributed import initialize

    enable_compilation_cache()
    initialize(os.environ)


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ours to print."""

    def __init__(self, prog: str, **kwargs):
        super().__init__(prog, add_help=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _overview(group: str = "") -> str:
    rows = {
        f"jaxgen {name} {command.usage}": command.summary
        for name, command in COMMANDS.items()
        if name.startswith(group)
    }
    width = max(map(len, rows))
    lines = [f"  {usage:{width}}  {summary}" for usage, summary in rows.items()]
    return "\n".join(
        [
            "Trains and serves generative transformers in JAX, sharded over any mesh.",
            "",
            *lines,
            "",
            "CONFIG is a Python file, such as configs/tiny.py; MODEL is a run directory.",
            "Every field of a config can be set: --train.steps 100 --mesh.fsdp 4.",
            "COMMAND --help shows the options, CONFIG --help the fields and their values.",
        ]
    )


def _field_help(config: Any) -> str:
    """Every field of a config: how to set it, what it does, and its value now."""
    columns = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    lines = []
    for field in fields.walk(config):
        if field.is_group:
            state = "" if field.value is not None else " [none; set a field to switch it on]"
            lines += ["", *textwrap.wrap(f"{field.path}: {field.doc}{state}", columns)]
            continue
        usage = f"  --{field.path} {fields.kind_text(field.kind)}"
        text = field.doc
        if not field.in_absent_group:
            text += f" [{fields.value_text(field.value)}]"
        lines.append(usage)
        lines += textwrap.wrap(text, columns, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines).strip("\n")
