"""A trained model and its tokenizer, from a run directory or one of its checkpoints."""

import dataclasses
import os

import jax
from etils import epath
from jax.sharding import Mesh

from jaxgen.checkpoint import address
from jaxgen.checkpoint.manager import CheckpointManager
from jaxgen.config import CHECKPOINTS, FILE_NAME, TOKENIZER, TrainConfig
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.models.decoder import Decoder
from jaxgen.nn.schedule import Pipeline
from jaxgen.sharding import abstract


def split_location(location: str | os.PathLike) -> tuple[epath.Path, int | None]:
    """Returns the run directory, and the step if `location` is RUN/checkpoints/STEP.

    Raises:
        UserError: it is neither, or its store cannot be reached.
    """
    path = address.resolve(location)
    with address.reaching(path):
        if (path / FILE_NAME).exists():
            return path, None
    if path.name.isdecimal() and path.parent.name == CHECKPOINTS:
        return path.parent.parent, int(path.name)
    raise UserError(
        f"{location} is no run directory and no checkpoint of one; "
        "give one that jaxgen train made, such as runs/tiny or runs/tiny/checkpoints/00000200"
    )


def load_model(
    location: str | os.PathLike, config: TrainConfig, mesh: Mesh
) -> tuple[Decoder, Tokenizer]:
    """Returns the model of a run's newest checkpoint, or of the one given, and its tokenizer.

    Only the model is read, straight into its shards on `mesh`, whatever mesh it was trained on.

    Raises:
        UserError: nothing is there, or it is damaged, or the model does not fit the mesh.
    """
    run_dir, step = split_location(location)
    config.model.check_mesh(mesh, config.rules)

    def make() -> Decoder:
        # Without repeats, as the checkpoint holds it.
        compute = dataclasses.replace(config.compute, pipeline=Pipeline())
        key = jax.random.key(0)
        return Decoder(config.model, key=key, compute=compute, rules=config.rules)

    with CheckpointManager(run_dir / CHECKPOINTS) as checkpoints:
        model = checkpoints.restore(abstract(make, mesh), step=step, only="model").state
    return model, Tokenizer.load(str(run_dir / TOKENIZER))
