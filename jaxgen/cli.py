"""The `jaxgen` command: a config file, dotted overrides, help, and errors without tracebacks.

What the subcommands do is in commands.py; here is how they are asked.
"""

import argparse
import errno
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from jaxgen import __version__, fields
from jaxgen.command import Command, load
from jaxgen.commands import COMMANDS
from jaxgen.errors import UserError
from jaxgen.options import FILE, OPTIONS
from jaxgen.ranges import range_of

# The user's machine, not our bug: no permission, no space, a read-only or vanished place.
ENVIRONMENT_ERRORS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
)


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
    # A message that names the command has said who speaks.
    print("jaxgen:", " ".join(message.split()).removeprefix("jaxgen "), file=sys.stderr)
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
        parser.usage += "" if source == FILE else " [--field value ...]"
        parser.add_argument("source", nargs="?", **OPTIONS[source])
    for output in command.outputs:
        parser.add_argument(output, nargs="?", **OPTIONS[output])
    for option in options:
        parser.add_argument(option, **OPTIONS[option])
    wants_help = "-h" in argv or "--help" in argv
    argv, overrides = _split([arg for arg in argv if arg not in ("-h", "--help")], options)
    args = parser.parse_args(argv, argparse.Namespace(source=None, overrides=overrides))
    args.outputs = [getattr(args, output) for output in command.outputs]
    needs_source = args.source is None and command.default is None
    if wants_help:
        print(parser.format_help())
        if needs_source and source != FILE:
            print(f"jaxgen {name} {source} --help shows the fields too, with their values.")
        if needs_source:
            return 0
    elif needs_source:
        raise _needs(name, source)
    elif None in args.outputs:
        raise _needs(name, command.outputs[args.outputs.index(None)])
    if args.devices is not None:
        from jaxgen.sharding import simulate_devices

        simulate_devices(args.devices)
    config = load(command, args, overrides)
    if wants_help:
        print(_field_help(config))
        return 0
    return command.run(args, config)


def _needs(name: str, argument: str) -> UserError:
    option = OPTIONS[argument]
    return UserError(f"jaxgen {name} needs {option['metavar']}: {option['help']}")


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
        if value is None or (value.startswith("--") and not equals) or " " in name:
            before = rest[-1] if rest else ""
            takes = before in options and OPTIONS[before].get("action") != "store_true"
            meant = f"; for a value of {before}: {before}={token!r}" if takes else ""
            raise UserError(f"{name} needs a value: {name} VALUE or {name}=VALUE{meant}")
        overrides[name[2:]] = value
    return rest, overrides


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ours to print."""

    def __init__(self, prog: str, **kwargs):
        super().__init__(prog, add_help=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        if " expected " in message and message.endswith("argument"):
            option = message.removeprefix("argument ").partition(":")[0]
            message += f"; if its value begins with a dash: {option}=VALUE"
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
            "CONFIG is a Python file, such as configs/tiny.py; MODEL is a run directory,",
            "one of its checkpoints, or a Hugging Face folder.",
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
        if allowed := range_of(field.kind):
            usage += f" {allowed.text()}"
        text = field.doc
        if not field.in_absent_group:
            text += f" [{fields.value_text(field.value)}]"
        lines.append(usage)
        lines += textwrap.wrap(text, columns, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines).strip("\n")
