"""Other weights for an engine that runs: read, converted and checked on the host."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.models.config import DecoderConfig
from jaxgen.models.decoder import Decoder
from jaxgen.pretrained import Pretrained, abstract_model, open_model
from jaxgen.sharding import MeshConfig, make_mesh


class ReloadRunning(UserError):
    """Weights are being loaded already."""


class Reloaded(NamedTuple):
    """What loading other weights came to."""

    weight_version: str
    """Of those that serve now."""
    read_s: float
    """For how long they were read and converted, while the old ones served."""
    pause_s: float
    """For how long nothing was computed; then what runs is read again."""


Source = Decoder | Pretrained | str | os.PathLike
"""A model, or what `open_model` takes or returns."""


def stage(
    source: Source, running: Decoder, convert: Callable[[Decoder, bool], Decoder]
) -> list[jax.Array]:
    """Returns a model's weights in the host's memory.

    Args:
        source: where they are from.
        running: the model that they are for.
        convert: makes of a model one like `running`, on any mesh; and whether the model is of no
            use any more.

    Raises:
        UserError: they are not there, damaged, not finite, or of another model; or JAX has no CPU.
    """
    try:
        host = jax.local_devices(backend="cpu")[:1]
    except RuntimeError:
        raise UserError(
            f"weights are staged on the CPU, which JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')} "
            "leaves out; add cpu to it"
        ) from None
    mesh = make_mesh(MeshConfig(), host)
    if isinstance(source, Decoder):
        where, model = "the model", source
        _check_config(where, model.config, running.config)
        model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    else:
        source = source if isinstance(source, Pretrained) else open_model(source)
        where = source.location
        _check_config(where, source.config, running.config)
        model = source.read(abstract_model(source.serve_config(), mesh, source.dtype))
    with jax.set_mesh(mesh):
        model = convert(model, not isinstance(source, Decoder))
        params = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_param)[0]
        for path, param in params:
            if not all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(param)):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(f"{where} has numbers in {name} that are not finite; restore it")
    staged, wanted = jax.tree.leaves(model), jax.tree.leaves(running)
    assert [(x.shape, x.dtype) for x in staged] == [(x.shape, x.dtype) for x in wanted]
    return staged


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param)


def check_tokenizer(source: Pretrained, running: Tokenizer | None) -> None:
    """Checks that tokens mean the same to a model as to the running one.

    Raises:
        UserError: they do not.
    """
    if running is not None and source.tokenizer().fingerprint != running.fingerprint:
        raise UserError(
            f"{source.location} has another tokenizer than the running model; load a model with "
            "the same, or start another server"
        )


def _check_config(where: str, given: DecoderConfig, running: DecoderConfig) -> None:
    # What the running model takes at most is no matter of its weights.
    given = dataclasses.replace(given, max_seq_len=running.max_seq_len)
    differences = [
        f"{field.name}={theirs} where the running model has {ours}"
        for field in dataclasses.fields(DecoderConfig)
        if (theirs := getattr(given, field.name)) != (ours := getattr(running, field.name))
    ]
    if differences:
        raise UserError(
            f"{where} is another model: {', '.join(differences)}; load weights of the same model, "
            "or start another server"
        )
