"""Models in GGUF made into Hugging Face folders, a tensor at a time.

Weights are dequantised. What GGUF changes of a published model is changed back: the order of rotary
rows, Gemma's norm weights, frequencies that stand for a scaling.
"""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgen.data import sources
from jaxgen.data.tokenizer import Tokenizer, check_vocab
from jaxgen.errors import UserError
from jaxgen.formats import layout, safetensors
from jaxgen.formats.families import family_of
from jaxgen.formats.folder import CONFIG
from jaxgen.formats.gguf_config import LEFT_OUT, TOP, Architecture, Dtype, architecture_of, configs
from jaxgen.formats.gguf_file import GGUFFile
from jaxgen.formats.gguf_tokenizer import tokenizer_files
from jaxgen.formats.safetensors import Spec

_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def convert(path: str | os.PathLike, out: str | os.PathLike, dtype: Dtype = "float32") -> str:
    """Writes a GGUF file as a Hugging Face folder, one tensor after the other.

    Args:
        path: the GGUF file, on this machine.
        out: a folder on this machine that is not there yet, or empty; it appears when it is whole.
        dtype: of the weights; float32 holds dequantised ones exactly.

    Returns:
        One line that says what was written.

    Raises:
        UserError: the file is damaged, of an unknown architecture or tokenizer, or its tensors have
            no place; nothing is written.
    """
    out = Path(out)
    sources.check_empty(str(out))
    file = GGUFFile(os.fspath(path))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    kind = np.dtype(jnp.dtype(dtype))
    try:
        architecture, parts = _begin(file, partial, dtype)

        def write(opened: Any, tensor: str) -> None:
            weights = _weights(file, architecture, parts[tensor])
            opened.write(safetensors.cast(tensor, weights, kind).tobytes())

        specs = {name: Spec(kind, part.shape) for name, part in parts.items()}
        safetensors.write_files(str(partial), specs, write)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    count = sum(math.prod(part.shape) for part in parts.values())
    return f"wrote {out}: {architecture.name}, {count:,} weights in {dtype}"


class _Part(NamedTuple):
    """A tensor of theirs among GGUF's."""

    name: str
    """GGUF's."""
    expert: int | None
    """Which of those that stand in one tensor."""
    shape: tuple[int, ...]


def _begin(file: GGUFFile, folder: Path, dtype: Dtype) -> tuple[Architecture, dict[str, _Part]]:
    """Writes all but the weights, and checks that with these the folder will be a model."""
    try:
        architecture = architecture_of(file)
        parts = _parts(file, architecture)
        files = configs(file, architecture, dtype) | tokenizer_files(file.facts)
        file.finish()
    except (UserError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"its header contradicts itself ({error!r}); convert it again"
        if isinstance(error, UserError | KeyError):
            what = error if isinstance(error, UserError) else f"says no {error}; convert it again"
        raise UserError(f"{file.path}: {what}") from None
    for name, text in files.items():
        (folder / name).write_text(text)
    given = json.loads(files[CONFIG])
    family = family_of(given)
    try:
        config = family.read(given)
        model = layout.abstract_decoder(config)
        specs = {name: Spec(np.dtype(np.float32), part.shape) for name, part in parts.items()}
        layout.check("it", specs, family, model)
        check_vocab(Tokenizer.load(str(folder)), config.vocab_size)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    return architecture, parts


def _parts(file: GGUFFile, architecture: Architecture) -> dict[str, _Part]:
    """Returns Hugging Face's name of each tensor, and where it is."""
    parts = {}
    for name, shape in file.shapes.items():
        if name == LEFT_OUT:
            continue
        found = _NAME.fullmatch(name)
        layer, place, kind = found.groups("") if found else ("", "", "")
        theirs = (architecture.tensors if layer else TOP).get(place)
        if theirs is None:
            raise UserError(f"tensor {name} has no place in a {architecture.name}")
        if layer:
            theirs = f"model.layers.{layer}.{theirs}"
        if "{expert}" in theirs:
            for expert in range(shape[0]):
                part = _Part(name, expert, shape[1:])
                parts[f"{theirs.format(expert=expert)}.{kind}"] = part
        else:
            parts[f"{theirs}.{kind}"] = _Part(name, None, shape)
    return parts


def _weights(file: GGUFFile, architecture: Architecture, part: _Part) -> np.ndarray:
    """Returns a tensor in fp32, as Hugging Face has it."""
    weights = file.weights(part.name, part.expert).reshape(part.shape)
    place = part.name.split(".")[-2]
    if place in ("attn_q", "attn_k") and architecture.interleaved:
        # [heads, half, 2, ...] here; [heads, 2, half, ...] there.
        heads = file.heads[place == "attn_k"]
        weights = weights.reshape(heads, -1, 2, *part.shape[1:]).swapaxes(1, 2)
        weights = weights.reshape(part.shape)
    if place.endswith("norm"):
        weights = weights - np.float32(architecture.norm_offset)
    return weights
