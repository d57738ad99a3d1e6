"""Where the parameters of a model stand among the tensors of Hugging Face files.

Ours are stacked over layers (and experts), and a product's inputs come first; theirs are a tensor a
layer, [outputs, inputs].
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxgen.checkpoint.tree import named_leaves
from jaxgen.errors import UserError
from jaxgen.formats.families import Family, Tensor
from jaxgen.formats.safetensors import Spec
from jaxgen.models.config import DecoderConfig
from jaxgen.models.decoder import Decoder
from jaxgen.sharding import MeshConfig, abstract_mesh


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter of ours among tensors of theirs."""

    tensor: Tensor
    leaf: Any
    """The parameter, or its shape, dtype and sharding."""
    rows_before: int
    """Of other parameters in the same tensors."""

    @property
    def num_stacked(self) -> int:
        """Leading dimensions that count layers and experts."""
        return sum(f"{{{name}}}" in self.tensor.theirs for name in ("layer", "expert"))

    @property
    def stack(self) -> tuple[int, ...]:
        """Layers, or layers and experts, or nothing."""
        return self.leaf.shape[: self.num_stacked]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The dimensions of a product's inputs."""
        return self.leaf.shape[self.num_stacked :][: self.tensor.inputs]

    @property
    def outputs(self) -> tuple[int, ...]:
        """All other dimensions."""
        return self.leaf.shape[self.num_stacked + self.tensor.inputs :]

    @property
    def nbytes(self) -> int:
        """Of one of the stack."""
        return math.prod((*self.inputs, *self.outputs)) * self.leaf.dtype.itemsize

    @property
    def turned(self) -> tuple[int, ...]:
        """The order of the dimensions in their tensors: outputs, then inputs."""
        count = len(self.inputs)
        return (*range(count, count + len(self.outputs)), *range(count))

    def name(self, index: tuple[int, ...]) -> str:
        """Their name of the tensor that holds one of the stack."""
        layer, expert = (*index, 0, 0)[:2]
        return self.tensor.theirs.format(layer=layer, expert=expert)


def places_of(family: Family, model: Decoder) -> list[Place]:
    """Returns where each parameter stands, in the order of the model's leaves.

    Raises:
        UserError: the family has no place for one.
    """
    named = dict(named_leaves(model))
    table = {tensor.ours: tensor for tensor in family.tensors}
    if unknown := [name for name in named if name not in table]:
        raise UserError(f"{family.architecture} has no tensor for the parameter {unknown[0]}")

    def rows(name: str) -> int:
        return math.prod(Place(table[name], named[name], 0).outputs)

    return [
        Place(table[name], leaf, sum(map(rows, table[name].after))) for name, leaf in named.items()
    ]


def shapes_of(places: list[Place]) -> dict[str, tuple[int, ...]]:
    """Returns every tensor that files of this model hold, by name, and its shape."""
    rows: dict[str, int] = defaultdict(int)
    for place in places:
        rows[place.tensor.theirs] += math.prod(place.outputs)
    shapes = {}
    for place in places:
        shape = place.outputs
        if place.inputs:
            shape = (rows[place.tensor.theirs], math.prod(place.inputs))
        elif place.stack:
            shape = (rows[place.tensor.theirs],)
        shapes |= {place.name(index): shape for index in np.ndindex(place.stack)}
    return shapes


def tied(family: Family, model: Decoder) -> tuple[str, str] | None:
    """Returns the tensors of the output layer and the embedding, if these are one parameter."""
    table = {tensor.ours: tensor.theirs for tensor in family.tensors}
    return (table["head"], table["embedding"]) if model.config.tie_embeddings else None


def abstract_decoder(config: DecoderConfig) -> Decoder:
    """Returns the shapes of a model's parameters, on no device."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(MeshConfig(fsdp=1))):
        return jax.eval_shape(lambda: Decoder(config, key=jax.random.key(0)))


def check(folder: str, stored: Mapping[str, Spec], family: Family, model: Decoder) -> None:
    """Checks that files hold exactly the tensors of a model, in the shapes of its config.

    Raises:
        UserError: the first tensor that is missing, of another shape, or has no place in it.
    """
    shapes = shapes_of(places_of(family, model))
    for name, shape in shapes.items():
        if name not in stored:
            raise UserError(
                f"{folder} has no tensor {name}, which is {list(shape)} by its config; "
                "correct that, or copy the files again"
            )
        if stored[name].shape != shape:
            raise UserError(
                f"tensor {name} is {list(stored[name].shape)} in {folder} and {list(shape)} "
                f"by its config; correct the one that is wrong"
            )
    # A table that is tied may be there once more, and angles are computed.
    again = tied(family, model) or ()
    for name in stored:
        if not (name in shapes or name in again or name.endswith("rotary_emb.inv_freq")):
            raise UserError(
                f"tensor {name} {list(stored[name].shape)} in {folder} has no place in a "
                f"{family.architecture} of its config; correct that, or remove the tensor"
            )
