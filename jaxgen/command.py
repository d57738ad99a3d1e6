"""What a subcommand of `jaxgen` is, and how the config that it runs with is found."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxgen import fields
from jaxgen.options import CONFIG, FILE


def join() -> None:
    """Turns the compilation cache on and joins the other processes of the run."""
    from jaxgen.compiler import enable_compilation_cache
    from jaxgen.distributed import initialize

    enable_compilation_cache()
    initialize(os.environ)


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
