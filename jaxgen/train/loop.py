"""The training loop: what a run does, from start or resume to its last checkpoint."""

import contextlib
import dataclasses
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from jax.sharding import Mesh

from jaxgen.checkpoint.address import resolve
from jaxgen.checkpoint.manager import CheckpointManager
from jaxgen.data.dataset import PackedData
from jaxgen.data.loader import Loader
from jaxgen.distributed import Preemption
from jaxgen.errors import UserError
from jaxgen.fields import to_json
from jaxgen.metrics import MetricWriter
from jaxgen.models.decoder import Decoder
from jaxgen.ranges import Count, PositiveOrZero, Seed, check_ranges
from jaxgen.train.evaluate import evaluate
from jaxgen.train.origin import check_same_origin, note_of, open_origin
from jaxgen.train.program import (
    abstract_state,
    lower_evaluation,
    lower_step,
    make_state,
    read_decoder,
    relayout,
    stored_state,
)
from jaxgen.train.run_dir import RunDirectory
from jaxgen.train.start import Program, start
from jaxgen.train.step import TrainState

if TYPE_CHECKING:
    from jaxgen.config import TrainConfig
    from jaxgen.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a run is, and what one step takes."""

    steps: Count = 1000
    """Optimizer steps in the whole run; the learning-rate schedule ends here."""
    batch_size: Count = 32
    """Rows in each step, over all devices and micro-batches."""
    seq_len: Count = 1024
    """Tokens in a row."""
    grad_accum_steps: Count = 1
    """Micro-batches that each step adds up; a row count must divide into them."""
    z_loss: PositiveOrZero = 0.0
    """Weight of logsumexp(logits)^2 in the objective; 1e-4 keeps logits from drifting."""
    seed: Seed = 0
    """Of the initial parameters. The order of the data has its own, data.shuffle_seed."""

    def __post_init__(self):
        check_ranges(self, "train.")


def train(config: "TrainConfig", run_dir: epath.PathLike, mesh: Mesh | None = None) -> TrainState:
    """Trains until `config.train.steps`, from the newest checkpoint of `run_dir` if it has one.

    Args:
        config: the run.
        run_dir: where its config, metrics and checkpoints live. The same call resumes it.
        mesh: what to run on; None makes `config.mesh` of all devices.

    Returns:
        The last state.

    Raises:
        UserError: something in the config, the data or the run directory cannot work.
        KeyboardInterrupt: after a Ctrl-C, when the state is saved. SIGTERM saves and returns.
    """
    from jaxgen.config import CHECKPOINTS, TOKENIZER, save_config

    run_dir = resolve(run_dir)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            CheckpointManager(run_dir / CHECKPOINTS, config.checkpoint)
        )
        checkpoints.check_usable()
        directory = stack.enter_context(RunDirectory(run_dir))
        directory.claim()
        programs = [lower_step]
        if config.eval.every_steps:
            programs.append(lower_evaluation)
        # A resumed run goes on from its own weights.
        origin = open_origin(config) if checkpoints.latest_step() is None else None
        begun = stack.enter_context(start(config, mesh, *programs))
        mesh, loader, packed = begun.mesh, begun.loader, begun.loader.packed
        train_step, *evaluation = begun.programs
        state, first, note = _begin(config, mesh, checkpoints, packed, origin)
        if first == config.train.steps and jax.process_index() == 0:
            print(f"{run_dir} has done all of its {first} steps", flush=True)
        about = {"config": to_json(config), "data": packed.fingerprint, "init": note}
        held_out = _HeldOut(config, loader, *evaluation)
        for traced in begun.traced:
            traced.result()
        # Nothing more is refused: from here on the run leaves files.
        directory.claim(make=True)
        # Nothing is trained with another config: that of a finished run stays true.
        if first < config.train.steps and jax.process_index() == 0:
            save_config(config, run_dir)
            packed.tokenizer.save(str(run_dir / TOKENIZER))
        metrics = stack.enter_context(
            MetricWriter(
                run_dir,
                config.metrics,
                resume_step=first,
                total_steps=config.train.steps,
                flops_per_token=config.flops_per_token,
                devices=mesh.devices.flatten().tolist(),
            )
        )
        if first == 0 and held_out.every:
            metrics.write(0, {}, **held_out(state.decoder))
        checkpoints.preload()
        stored = stored_state(config, mesh).saved()
        batches = stack.enter_context(loader.batches(first, config.train.steps))
        preemption = stack.enter_context(Preemption())
        for step, batch in enumerate(batches, start=first + 1):
            state, values = train_step.result().run(state, batch)
            _stop_if_broken(config, metrics.write(step, values, data_wait_s=batches.wait_s))
            checkpoints.check()
            last, stopping = step == config.train.steps, preemption.reached(step)
            if held_out.due(step) or (last and held_out.every):
                with metrics.paused():
                    metrics.add(**held_out(state.decoder))
            if last or stopping or checkpoints.due(step):
                # First the metrics: a resumed run writes no line of a step before its checkpoint.
                _stop_if_broken(config, metrics.flush())
                checkpoints.save(step, relayout(state.saved(), stored), about)
            if stopping:
                break
        checkpoints.wait()
    if preemption.signal == "SIGINT":
        raise KeyboardInterrupt  # What was to follow a whole run must not.
    return state


def _begin(
    config: "TrainConfig",
    mesh: Mesh,
    checkpoints: CheckpointManager,
    packed: PackedData,
    origin: "Pretrained | None",
) -> tuple[TrainState, int, dict[str, Any] | None]:
    """Returns the newest state of the run, or a fresh one, the steps it has done, and a note of the
    weights that it started from."""
    if checkpoints.latest_step() is None:
        note = note_of(origin) if origin else None
        return make_state(config, mesh, origin), 0, note
    state, step, about = checkpoints.restore(stored_state(config, mesh).saved())
    check_same_origin(config, about, checkpoints.directory)
    _check_same_data(config, about, packed.fingerprint, checkpoints)
    if step > config.train.steps:
        raise UserError(
            f"{checkpoints.directory} has done {step} steps and train.steps={config.train.steps}; "
            "raise it, or give another --run-dir"
        )
    state = relayout(state, abstract_state(config, mesh).saved())
    if config.lora is not None:
        from jaxgen.pretrained import open_noted

        base = read_decoder(config, mesh, open_noted(about["init"]))
        state = dataclasses.replace(state, base=base)
    return state, step, about.get("init")


def _check_same_data(
    config: "TrainConfig", about: dict[str, Any], fingerprint: str, checkpoints: CheckpointManager
) -> None:
    """A resumed run must see the rows it would have seen: nothing lost, nothing twice."""
    then = about["config"]["train"]
    for name in ("batch_size", "seq_len"):
        now = getattr(config.train, name)
        if then[name] != now:
            raise UserError(
                f"train.{name}={now}, but {checkpoints.directory} was trained with {then[name]}; "
                f"use train.{name}={then[name]}, or give another --run-dir"
            )
    if about["data"] != fingerprint:
        raise UserError(
            f"the data is not what {checkpoints.directory} was trained on (sources, weights, "
            "tokenizer or data.shuffle_seed changed); restore it, or give another --run-dir"
        )


class _HeldOut:
    """Evaluates on the same held-out batches every time; they stay on the devices."""

    def __init__(
        self, config: "TrainConfig", loader: Loader, evaluation: Future[Program] | None = None
    ):
        self.every = config.eval.every_steps
        self.evaluation = evaluation
        self.batches = list(loader.held_out(config.eval.batches)) if self.every else []
        self.bytes_per_token = loader.packed.eval_bytes_per_token

    def due(self, step: int) -> bool:
        """Whether this step is followed by an evaluation."""
        return bool(self.every) and step % self.every == 0

    def __call__(self, model: Decoder) -> dict[str, float]:
        """Returns eval_loss and eval_bits_per_byte."""
        assert self.evaluation is not None
        compiled = self.evaluation.result().run
        return evaluate(compiled, model, self.batches, bytes_per_token=self.bytes_per_token)


def _stop_if_broken(config: "TrainConfig", written: dict[str, Any] | None) -> None:
    """Ends a run whose last steps were all skipped; its checkpoints are from before."""
    limit = config.optimizer.max_skipped_in_row
    if written and written.get("skipped_in_row", 0) >= limit:
        raise UserError(
            f"{limit} steps in a row were skipped until step {written['step']} (loss "
            f"{written['loss']}, gradient norm {written['grad_norm']}): lower "
            "optimizer.learning_rate, raise optimizer.warmup_steps, or look at the data with "
            f"jaxgen data show --step {written['step']}"
        )
