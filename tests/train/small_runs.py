"""Small configs, rows that do not need a tokenizer, and steps over them, for the tests of training.

B rows, T tokens a row.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen.checkpoint.manager import CheckpointConfig
from jaxgen.config import TrainConfig
from jaxgen.data.config import DataConfig
from jaxgen.data.loader import Batch
from jaxgen.data.sources import Source
from jaxgen.metrics import MetricsConfig
from jaxgen.models.config import ComputeConfig, DecoderConfig
from jaxgen.nn.stack import Remat
from jaxgen.parity import DENSE
from jaxgen.sharding import MeshConfig, make_mesh
from jaxgen.train.evaluate import EvalConfig
from jaxgen.train.loop import LoopConfig
from jaxgen.train.optimizer import OptimizerConfig
from jaxgen.train.program import abstract_state, batch_sharding, compile_step, make_state
from jaxgen.train.step import TrainState

LLAMA = DecoderConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    mlp_dim=32,
    max_seq_len=32,
)
# Every option of the decoder that has a path of its own through the sharding.
GEMMA = dataclasses.replace(DENSE.model, num_layers=2, num_heads=4, num_kv_heads=4, max_seq_len=32)
ONE = MeshConfig(fsdp=1)


def config_of(model: DecoderConfig = LLAMA, **parts: Any) -> TrainConfig:
    """A config of fp32 steps on eight rows of sixteen tokens."""
    defaults = {
        "data": DataConfig(),
        "mesh": ONE,
        "compute": ComputeConfig(dtype="float32", remat=Remat.nothing()),
        "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
        "train": LoopConfig(steps=20, batch_size=8, seq_len=16),
    }
    return TrainConfig(name="small", model=model, **(defaults | parts))


def run_config(folder: Any, mesh: MeshConfig = ONE, **parts: Any) -> TrainConfig:
    """A config of whole runs, whose text and packed rows are in `folder`."""
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir(parents=True)
        rng = np.random.default_rng(0)
        words = ["def", "return", "self", "value", "for", "in", "open", "import", "yield", "None"]
        for number in range(40):
            text = " ".join(rng.choice(words, size=rng.integers(3, 30)))
            (texts / f"{number:02d}.txt").write_text(f"{number} {text}\n")
    defaults = {
        "data": DataConfig(
            sources=(Source(kind="text", path=f"{texts}/*.txt"),),
            cache_dir=str(folder / "cache"),
            eval_fraction=0.1,
        ),
        "mesh": mesh,
        "eval": EvalConfig(every_steps=0),
        "checkpoint": CheckpointConfig(save_every_steps=1000),
        "metrics": MetricsConfig(tensorboard=False),
    }
    # 258 tokens of bytes and specials, and divisible by any axis.
    model = dataclasses.replace(LLAMA, vocab_size=264)
    return config_of(model, **(defaults | parts))


def rows(step: int, num_rows: int = 8, seq_len: int = 16, vocab_size: int = 64) -> Batch:
    """Row r of a step: two documents and padding, none as long as in the row before.

    Plain integer arithmetic, so that they are the same under every version of everything; half of
    the tokens follow from the one before, so that there is something to learn.
    """
    shape = (num_rows, seq_len)
    tokens = np.zeros(shape, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row in range(num_rows):
        number = 1 + step * num_rows + row
        first = 3 + number % (seq_len // 2 - 3)
        second = min(seq_len - first, 2 + number * number % (seq_len // 2))
        for segment, (start, length) in enumerate([(0, first), (first, second)], start=1):
            token = (7 * number + segment) % vocab_size
            for i in range(start, start + length):
                tokens[row, i] = token
                segments[row, i], positions[row, i] = segment, i - start
                token = (3 * token + (i * number % 5 if i % 2 else 1)) % vocab_size
    targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets[:, :-1] = np.where(follows, tokens[:, 1:], 0)
    weights[:, :-1] = follows
    return Batch(tokens, targets, positions, segments, weights)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, a way to make its first state and to place rows for it."""

    config: TrainConfig
    mesh: jax.sharding.Mesh
    step: jax.stages.Compiled

    @functools.cached_property
    def _first(self) -> TrainState:
        return jax.device_get(make_state(self.config, self.mesh))

    @functools.cached_property
    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(self.config, self.mesh))

    def new_state(self) -> TrainState:
        """A fresh state. It is drawn once, for a step owns and ends the one it is given."""
        return self.like(self._first)

    def like(self, state: TrainState) -> TrainState:
        """The values of a state, on this program's mesh."""
        # Leaf by leaf: the model of another config is another pytree.
        shardings, tree = jax.tree.flatten(self._shardings)
        placed = map(jax.device_put, jax.tree.leaves(jax.device_get(state)), shardings)
        return jax.tree.unflatten(tree, placed)

    def scalar(self, value: Any) -> jax.Array:
        """A number as a state holds it."""
        return jax.device_put(value, NamedSharding(self.mesh, PartitionSpec()))

    def place(self, batch: Batch) -> Batch:
        sharding = batch_sharding(self.config, self.mesh)
        return Batch(*(jax.device_put(np.asarray(x), sharding) for x in batch))

    def run(self, num_steps: int, state: TrainState | None = None):
        """Returns the state after `num_steps`, and {name: values of all steps}."""
        state = state or self.new_state()
        metrics = []
        for step in range(num_steps):
            state, values = self.step(state, self.place(rows(step)))
            metrics.append(jax.device_get(values))
        return state, {name: np.array([m[name] for m in metrics]) for name in metrics[0]}


def program(config: TrainConfig) -> Program:
    """Compiles the step of this config on as many devices as its mesh has."""
    sizes = [max(size, 1) for size in config.mesh.sizes.values()]
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(sizes))])
    return Program(config, mesh, compile_step(config, mesh))


def on_host(tree: Any) -> list[np.ndarray]:
    """The leaves of a tree as NumPy arrays."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def max_relative(got: Any, expected: Any) -> float:
    """The largest relative difference of two series."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(got - expected) / np.abs(expected)))
