"""The config of a training run: a tree of the components' own configs, and the checks across them.

A config file is Python that assigns a `TrainConfig` to `config` (or any other name). The tree that
ran, overrides included, is written to `config.json` in the run directory and reads back equal.
"""

import dataclasses
import json
import math
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from jaxgen import fields
from jaxgen.checkpoint.manager import CheckpointConfig
from jaxgen.data.config import DataConfig
from jaxgen.errors import UserError
from jaxgen.metrics import MetricsConfig
from jaxgen.models.config import ComputeConfig, DecoderConfig
from jaxgen.sharding import MeshConfig, Rules, logical_to_mesh
from jaxgen.train.evaluate import EvalConfig
from jaxgen.train.loop import LoopConfig
from jaxgen.train.optimizer import OptimizerConfig

# What a run directory holds, beside metrics.jsonl and tensorboard/.
FILE_NAME = "config.json"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a training run computes and where it puts it."""

    name: str
    """Names the run: its directory is runs/NAME unless --run-dir says otherwise."""
    model: DecoderConfig
    """The shape of the model."""
    data: DataConfig
    """What is read, and how it becomes tokens."""
    mesh: MeshConfig = MeshConfig()
    """How many devices split what."""
    rules: Rules = Rules()
    """Which mesh axes split each logical axis."""
    compute: ComputeConfig = ComputeConfig()
    """How the model is run: precision, attention backend, rematerialisation."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become updates."""
    train: LoopConfig = LoopConfig()
    """How long, with which batches and seed."""
    eval: EvalConfig = EvalConfig()
    """The held-out evaluation during training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state is saved and what is kept."""
    metrics: MetricsConfig = MetricsConfig()
    """What is logged, and where."""

    def check(self, mesh: Mesh | AbstractMesh) -> None:
        """Checks fields against each other and against a mesh, before anything is computed.

        Raises:
            UserError: the first pair that disagrees, with both values and a way out.
        """
        train, model, rules = self.train, self.model, self.rules.on(mesh)
        self.compute.pipeline.check(mesh, rules, model.num_layers)
        model.check_mesh(mesh, rules)
        if model.moe is None and self.compute.expert_dispatch != "all_gather":
            raise UserError(
                f"compute.expert_dispatch={self.compute.expert_dispatch!r} and model.moe is None; "
                "give the model experts, or leave it 'all_gather'"
            )
        if train.seq_len > model.max_seq_len:
            raise UserError(
                f"train.seq_len={train.seq_len} is longer than "
                f"model.max_seq_len={model.max_seq_len}; use train.seq_len={model.max_seq_len}, "
                "or a model made for longer sequences"
            )
        schedule = self.compute.pipeline.schedule(mesh, rules)
        cuts = {
            "train.grad_accum_steps": train.grad_accum_steps,
            "compute.pipeline.num_microbatches": schedule.microbatches if schedule else 1,
        }
        divisor = math.prod(cuts.values()) * rules.shards("batch", mesh)
        if train.batch_size % divisor:
            parts = [f"{name}={num}" for name, num in cuts.items() if num > 1]
            parts += [f"mesh.{axis}={mesh.shape[axis]}" for axis in logical_to_mesh(rules.batch)]
            best = -(-train.batch_size // divisor) * divisor
            raise UserError(
                f"train.batch_size={train.batch_size} is not divisible by {' x '.join(parts)}; "
                f"use train.batch_size={best}"
            )
        # Two chunks on each device of a sequence (zigzag), and equal parts of the residual stream.
        context, parts = rules.shards("seq", mesh), rules.shards("act_seq", mesh)
        multiple = math.lcm(2 * context if context > 1 else 1, parts)
        if train.seq_len % multiple:
            axes = dict.fromkeys(logical_to_mesh(rules.seq) + logical_to_mesh(rules.act_seq))
            given = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            best = -(-train.seq_len // multiple) * multiple
            raise UserError(
                f"train.seq_len={train.seq_len} is not divisible by {multiple}, as sequences over "
                f"{given} need; use train.seq_len={best}, or fewer devices a sequence"
            )


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What a trained model is run with: for generation, evaluation, conversion."""

    model: DecoderConfig
    """The shape of the model."""
    mesh: MeshConfig = MeshConfig()
    """How many devices split what."""
    rules: Rules = Rules()
    """Which mesh axes split each logical axis."""
    compute: ComputeConfig = ComputeConfig()
    """How the model is run: precision, attention backend."""

    def check(self, mesh: Mesh | AbstractMesh) -> None:
        """Checks the model against a mesh.

        Raises:
            UserError: a dimension does not divide into its shards, with a way out.
        """
        self.model.check_mesh(mesh, self.rules)


def load_config(source: str, overrides: Mapping[str, str] | None = None) -> TrainConfig:
    """Runs a config file and returns its config.

    Args:
        source: `path.py` or `path.py:name`, where the name (default `config`) is a `TrainConfig` or
            a function without arguments that returns one.
        overrides: dotted field -> text, as on the command line.

    Raises:
        UserError: no such file or name, code that fails, another type, or an unknown field.
    """
    path, _, name = source.partition(":")
    name = name or "config"
    names = _run_file(Path(path))
    if name not in names:
        configs = [key for key, value in names.items() if isinstance(value, TrainConfig)]
        raise UserError(f"{path} has no {name!r}; it has {', '.join(configs) or 'no TrainConfig'}")
    value = names[name]
    if callable(value):
        value = _call(value, Path(path))
    if not isinstance(value, TrainConfig):
        raise UserError(f"{path}:{name} is a {type(value).__name__}; make it a TrainConfig")
    return fields.override(fields.from_json(TrainConfig, value), overrides or {})


def save_config(config: TrainConfig, run_dir: Any) -> None:
    """Makes a run directory (any `epath` location) and its `config.json`, whole or not at all.

    Raises:
        UserError: the directory cannot be made or written.
    """
    from etils import epath

    path = epath.Path(run_dir) / FILE_NAME
    partial = path.with_name(f"{FILE_NAME}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(fields.to_json(config), indent=2) + "\n")
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; give another --run-dir") from error


def read_config(run_dir: Any) -> TrainConfig:
    """Reads the `config.json` of a run directory.

    Raises:
        UserError: the directory is not a run, or another version wrote it.
    """
    from etils import epath

    path = epath.Path(run_dir) / FILE_NAME
    if not path.exists():
        raise UserError(f"{run_dir} has no {FILE_NAME}; give a run directory such as runs/tiny")
    try:
        return fields.from_json(TrainConfig, json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it or start another run") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _run_file(path: Path) -> dict[str, Any]:
    """Executes a config file like a script: the modules beside it can be imported."""
    try:
        code = compile(path.read_text(), path, "exec")
    except FileNotFoundError:
        known = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"no config file {path}{fields.did_you_mean(str(path), known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    sys.path.insert(0, str(path.parent))
    try:
        _call(lambda: exec(code, names), path)
    finally:
        sys.path.remove(str(path.parent))
    return names


def _call(function: Any, path: Path) -> Any:
    """Calls code of a config file; an error raised on one of its own lines is the user's.

    So is one of a config's `__post_init__`, which compares values of any type.
    """
    try:
        return function()
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == str(path)]
        if not own or not (frames[-1] is own[-1] or frames[-1].name == "__post_init__"):
            raise
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}:{own[-1].lineno}: {what}") from error
