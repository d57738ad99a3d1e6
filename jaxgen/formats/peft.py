"""Adapters as the folder of the `peft` package: adapter_config.json, adapter_model.safetensors.

Source: github.com/huggingface/peft, docs/source/developer_guides/checkpoint.md.
"""

import jax
import numpy as np

from jaxgen.data import sources
from jaxgen.errors import UserError
from jaxgen.formats import safetensors
from jaxgen.formats.families import Family
from jaxgen.nn.lora import TARGETS, Adapters, LoRAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(
    folder: str, family: Family, config: LoRAConfig, adapters: Adapters, base: str
) -> None:
    """Writes adapters so that `peft.PeftModel.from_pretrained(base_model, folder)` applies them.

    Args:
        folder: where, at any location.
        family: of the model that they stand beside.
        config: their rank, their scale and their weights.
        adapters: whole on this process's devices; process 0 writes.
        base: what the folder calls that model.

    Raises:
        UserError: the family has two of their weights in one tensor.
    """
    blocks = {name: TARGETS[name].block for name in config.targets}
    weights = {name: _weight_of(family, f"layers/{blocks[name]}/{name}") for name in blocks}
    arrays: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        pair = getattr(getattr(adapters, blocks[name]), name)
        # Theirs are [outputs, inputs] of each product, a tensor a layer.
        a, b = (np.asarray(jax.device_get(param[...])) for param in (pair.a, pair.b))
        num_layers, rank = len(a), config.rank
        sides = {"A": a.reshape(num_layers, -1, rank), "B": b.reshape(num_layers, rank, -1)}
        for side, stacked in sides.items():
            for layer, matrix in enumerate(stacked.swapaxes(1, 2)):
                tensor = weight.format(layer=layer)
                tensor = tensor.removesuffix("weight") + f"lora_{side}.weight"
                arrays[f"base_model.model.{tensor}"] = np.ascontiguousarray(matrix)
    if jax.process_index() != 0:
        return
    specs = {name: safetensors.Spec(array.dtype, array.shape) for name, array in arrays.items()}
    specs = safetensors.in_order(specs)
    with sources.writing(f"{folder}/{WEIGHTS}") as file:
        file.write(safetensors.make_header(specs))
        for name in specs:
            file.write(arrays[name].data)
    given = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(weight.split(".")[-2] for weight in weights.values()),
        "inference_mode": True,
    }
    sources.write_json(f"{folder}/{CONFIG}", given)


def _weight_of(family: Family, ours: str) -> str:
    """The name of their tensor for a parameter of ours, if it is one of its own."""
    table = {tensor.ours: tensor for tensor in family.tensors}
    theirs = table[ours].theirs
    shared = [tensor.ours for tensor in family.tensors if tensor.theirs == theirs]
    if len(shared) > 1:
        raise UserError(
            f"{family.architecture} has {', '.join(name.rpartition('/')[2] for name in shared)} in "
            f"one tensor, {theirs}, which no adapter of one of them fits; leave --adapter out, "
            "which merges them"
        )
    return theirs
