"""The model of a run of adapters: the weights that it started from, with its adapters merged."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxgen.checkpoint.tree import mesh_of
from jaxgen.errors import UserError
from jaxgen.formats import peft
from jaxgen.models.config import ComputeConfig
from jaxgen.models.decoder import Decoder
from jaxgen.nn.lora import Adapters, merge
from jaxgen.pretrained import GenerationDefaults, Pretrained, open_noted
from jaxgen.published import Published
from jaxgen.sharding import Rules, abstract, make_mesh


class Tuned(Pretrained):
    """Reads as any other model; sums are formed in fp32."""

    def __init__(self, run: Any):
        """Of a run as `open_model` finds it, whose weights alone mean nothing."""
        self.run, self.lora = run, run.run.lora
        self.location, self.tokenizer_location = run.location, run.tokenizer_location
        self.config, self.compute, self.rules = run.config, run.compute, run.rules

    @functools.cached_property
    def base(self) -> Pretrained:
        """What the adapters stand beside."""
        return open_noted(self.run.record.metadata["init"])

    @property
    def exact_location(self) -> str:
        """Of the checkpoint; see `Pretrained`."""
        return self.run.exact_location

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint, which notes that of the base."""
        return self.run.fingerprint

    @property
    def stored_dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """The base's."""
        return self.base.stored_dtype

    @property
    def generation(self) -> GenerationDefaults:
        """The base's."""
        return self.base.generation

    @property
    def published(self) -> Mapping[str, Any]:
        """The base's."""
        return self.base.published

    def read(self, abstract_model: Decoder) -> Decoder:
        """Returns the merged weights; see `Pretrained`."""
        leaves = jax.tree.leaves(abstract_model)
        mesh = next(mesh for leaf in leaves if (mesh := mesh_of(leaf)))
        adapters = self._adapters(mesh, abstract_model.rules)
        dtype = jnp.dtype(self.base.dtype)
        stored = jax.tree.map(lambda leaf: leaf.update(dtype=dtype), abstract_model)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_model)
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, abstract_model)
        add = jax.jit(
            lambda model, adapters: merge(model, adapters, dtypes), out_shardings=shardings
        )
        with jax.set_mesh(mesh):
            return add(self.base.read(stored), adapters)

    def write(self, location: str, model: Decoder, dtype: str | None = None) -> None:
        """Writes the merged weights as a folder like that of the base."""
        self.base.write(location, model, dtype)

    def write_adapter(self, location: str) -> None:
        """Writes the adapters alone; see `Pretrained`."""
        if not isinstance(self.base, Published):
            raise UserError(
                f"{self.location} began from {self.base.location}, which peft cannot load; export "
                "that with jaxgen convert to-hf, and train adapters for the result"
            )
        whole = Rules(**dict.fromkeys(name for name, _ in Rules().items()))
        adapters = self._adapters(make_mesh(), whole)
        peft.write_adapter(location, self.base.family, self.lora, adapters, self.base.location)

    def _adapters(self, mesh: Mesh, rules: Rules) -> Adapters:
        def make() -> Adapters:
            key, compute = jax.random.key(0), ComputeConfig()
            return Adapters(self.lora, self.config, key=key, compute=compute, rules=rules)

        wanted = abstract(make, mesh)
        return self.run.checkpoints.restore(wanted, self.run.record.step, only="model").state
