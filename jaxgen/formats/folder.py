"""Hugging Face folders: weights right into their shards, and out of them, without a copy between.

Ours are stacked over layers (and experts), and a product's inputs come first; theirs are a tensor a
layer, [outputs, inputs]. Whatever is not read from a file straight into its place goes through
buffers of a few megabytes.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import mmap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxgen.checkpoint.tree import mesh_of, named_leaves
from jaxgen.data import sources
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.formats import safetensors
from jaxgen.formats.families import Family, Tensor
from jaxgen.formats.safetensors import Spec, Stored
from jaxgen.models.decoder import Decoder
from jaxgen.progress import progress

CONFIG = "config.json"
GENERATION = "generation_config.json"
# Few bytes at once turn around in a core's cache; many requests at once keep a store busy.
_CHUNK_BYTES = 2 << 20
_THREADS = 16

Box = tuple[tuple[int, int], ...]
"""A part of an array: from and to in every dimension."""


@dataclasses.dataclass(frozen=True)
class _Place:
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
        return self.leaf.shape[: self.num_stacked]

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.leaf.shape[self.num_stacked :][: self.tensor.inputs]

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.leaf.shape[self.num_stacked + self.tensor.inputs :]

    @property
    def turned(self) -> tuple[int, ...]:
        """The order of the dimensions in their tensors: outputs, then inputs."""
        count = len(self.inputs)
        return (*range(count, count + len(self.outputs)), *range(count))

    def name(self, index: tuple[int, ...]) -> str:
        """Their name of one of the stack."""
        layer, expert = (*index, 0, 0)[:2]
        return self.tensor.theirs.format(layer=layer, expert=expert)

    def chunks(self, start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
        """Cuts a range of the first output dimension in parts of a few megabytes."""
        one = math.prod(self.outputs[1:]) * math.prod(self.inputs) * width
        step = max(1, _CHUNK_BYTES // one)
        for begin in range(start, stop, step):
            yield begin, min(begin + step, stop)


def _places(family: Family, model: Decoder) -> list[_Place]:
    named = dict(named_leaves(model))
    table = {tensor.ours: tensor for tensor in family.tensors}
    if unknown := [name for name in named if name not in table]:
        raise UserError(f"{family.architecture} has no tensor for the parameter {unknown[0]}")

    def rows(name: str) -> int:
        return math.prod(_Place(table[name], named[name], 0).outputs)

    return [
        _Place(table[name], leaf, sum(map(rows, table[name].after))) for name, leaf in named.items()
    ]


def _shapes(places: list[_Place]) -> dict[str, tuple[int, ...]]:
    """Every tensor that files of this model hold, and its shape."""
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


def check(folder: str, stored: Mapping[str, Stored], family: Family, model: Decoder) -> None:
    """Checks that files hold exactly the tensors of a model, in the shapes of its config.

    Raises:
        UserError: the first tensor that is missing, of another shape, or has no place in it.
    """
    shapes = _shapes(_places(family, model))
    for name, shape in shapes.items():
        if name not in stored:
            raise UserError(
                f"{folder} has no tensor {name}, which is {list(shape)} by its {CONFIG}; "
                "correct that, or copy the files again"
            )
        if stored[name].shape != shape:
            raise UserError(
                f"tensor {name} is {list(stored[name].shape)} in {folder} and {list(shape)} "
                f"by its {CONFIG}; correct the one that is wrong"
            )
    # A table that is tied may be there once more, and angles are computed.
    unused = {tensor.theirs for tensor in family.tensors if tensor.ours == "head"}
    for name in stored:
        if not (name in shapes or name in unused or name.endswith("rotary_emb.inv_freq")):
            raise UserError(
                f"tensor {name} {list(stored[name].shape)} in {folder} has no place in a "
                f"{family.architecture} of its {CONFIG}; correct that, or remove the tensor"
            )


def read_weights(
    folder: str, stored: Mapping[str, Stored], family: Family, model: Decoder
) -> Decoder:
    """Returns the weights in the shapes, dtypes and shardings of an abstract model.

    Each process reads what its devices hold, every tensor once. Beside the model the host holds
    the shards of one parameter, which leave one after the other.

    Raises:
        UserError: the files and the model disagree; then nothing has been read.
    """
    check(folder, stored, family, model)
    places = _places(family, model)
    total, done = sum(tensor.nbytes for tensor in stored.values()), 0
    leaves = []
    with (
        progress(f"reading {folder}", total) as show,
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
    ):
        for place in places:
            shape, sharding = place.leaf.shape, place.leaf.sharding
            devices: dict[Box, list[jax.Device]] = defaultdict(list)
            for device, slices in sharding.addressable_devices_indices_map(shape).items():
                devices[_box(slices, shape)].append(device)
            buffers = {
                box: _buffer([stop - start for start, stop in box], place.leaf.dtype)
                for box in devices
            }
            parts = list(_parts(place, stored, list(buffers)))
            for nbytes in pool.map(lambda part, to=buffers: part.copy(to), parts):
                done += nbytes
                show(done)
            arrays = []
            while buffers:
                box, buffer = buffers.popitem()
                # Copied on CPU too: an array that aliases a buffer cannot be donated.
                arrays += [jax.device_put(buffer, d, may_alias=False) for d in devices[box]]
                jax.block_until_ready(arrays)
            leaves.append(jax.make_array_from_single_device_arrays(shape, sharding, arrays))
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def _buffer(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array whose memory goes back when it is freed: malloc keeps what is below 32 MB."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return np.frombuffer(memory, dtype).reshape(shape)


def _box(slices: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(one.indices(size)[:2] for one, size in zip(slices, shape, strict=True))


class _Part(NamedTuple):
    """A range of a tensor of theirs, and the place it belongs to."""

    place: _Place
    stored: Stored
    index: tuple[int, ...]
    """In the stack."""
    start: int
    stop: int
    """In the first output dimension."""

    def copy(self, buffers: Mapping[Box, np.ndarray]) -> int:
        """Reads it into all shards that hold some of it; returns the bytes read."""
        place, start, stop = self.place, self.start, self.stop
        inner, cols = math.prod(place.outputs[1:]), math.prod(place.inputs)
        flat = self.stored.read(
            (place.rows_before + start * inner) * cols, (place.rows_before + stop * inner) * cols
        )
        # Cast before it is turned: both at once would take four times as long.
        values = flat.astype(place.leaf.dtype, copy=False)
        values = values.reshape(stop - start, *place.outputs[1:], *place.inputs)
        values = _bits(values.transpose(np.argsort(place.turned)))
        stacked = place.num_stacked
        for box, buffer in buffers.items():
            if not _holds(box, self.index):
                continue
            inside = list(box[stacked:])
            first = len(place.inputs)
            low, high = max(start, inside[first][0]), min(stop, inside[first][1])
            if low >= high:
                continue
            to = [slice(None)] * len(inside)
            to[first] = slice(low - inside[first][0], high - inside[first][0])
            inside[first] = (low - start, high - start)
            here = tuple(i - box[dim][0] for dim, i in enumerate(self.index))
            _bits(buffer)[(*here, *to)] = values[tuple(slice(*part) for part in inside)]
        return flat.nbytes


def _holds(box: Box, index: tuple[int, ...]) -> bool:
    return all(start <= i < stop for i, (start, stop) in zip(index, box, strict=False))


def _bits(values: np.ndarray) -> np.ndarray:
    """The same memory as integers: NumPy copies them three times as fast as bfloat16."""
    return values.view(f"u{values.dtype.itemsize}")


def _parts(place: _Place, stored: Mapping[str, Stored], boxes: list[Box]) -> Iterator[_Part]:
    first = place.num_stacked + len(place.inputs)
    for index in np.ndindex(place.stack):
        rows = [box[first] for box in boxes if _holds(box, index)]
        if not rows:
            continue
        tensor = stored[place.name(index)]
        low, high = min(start for start, _ in rows), max(stop for _, stop in rows)
        for start, stop in place.chunks(low, high, tensor.dtype.itemsize):
            yield _Part(place, tensor, index, start, stop)


def write_weights(
    folder: str,
    family: Family,
    model: Decoder,
    dtype: str,
    max_file_bytes: int = safetensors.MAX_FILE_BYTES,
) -> None:
    """Writes the weights of a model as safetensors files, one tensor of theirs at a time.

    Every process calls this, and process 0 writes.

    Raises:
        UserError: the family has no place for a parameter, or the folder cannot be written.
    """
    places, kind = _places(family, model), np.dtype(jax.numpy.dtype(dtype))
    files = safetensors.split(
        {name: Spec(kind, shape) for name, shape in sorted(_shapes(places).items())}, max_file_bytes
    )
    sources_of: dict[str, list[tuple[_Place, tuple[int, ...]]]] = defaultdict(list)
    for place in sorted(places, key=lambda place: place.rows_before):
        for index in np.ndindex(place.stack):
            sources_of[place.name(index)].append((place, index))
    writes = jax.process_index() == 0
    total, done = sum(spec.nbytes for specs in files.values() for spec in specs.values()), 0
    with progress(f"writing {folder}", total) as show:
        for name, specs in files.items():
            url = f"{folder}/{name}"
            with sources.writing(url) if writes else contextlib.nullcontext() as file:
                if file:
                    file.write(safetensors.make_header(specs))
                for tensor in specs:
                    for place, index in sources_of[tensor]:
                        # No name is given, so that it is gone before the next one is gathered.
                        _write_rows(file, tensor, place, _gather(place.leaf, index), kind)
                    done += specs[tensor].nbytes
                    show(done)
    if writes and len(files) > 1:
        sources.write_bytes(f"{folder}/{safetensors.INDEX}", safetensors.make_index(files))


def _write_rows(file: Any, name: str, place: _Place, values: np.ndarray, dtype: np.dtype) -> None:
    """Writes one of a stack in the order of their tensor, some rows at a time; or, without a file,
    nothing.
    """
    if file is None:
        return
    turned = _bits(values).transpose(place.turned)
    for start, stop in place.chunks(0, len(turned), values.dtype.itemsize):
        rows = np.ascontiguousarray(turned[start:stop]).reshape(-1).view(values.dtype)
        file.write(_cast(name, rows, dtype).view(np.uint8).data)


def _cast(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = values.astype(dtype, copy=False)
    if dtype == np.float16 and not np.isfinite(cast).all():
        raise UserError(f"tensor {name} has values that float16 has not; use bfloat16 or float32")
    return cast


def write_folder(
    folder: str,
    family: Family,
    given: Mapping[str, Any],
    model: Decoder,
    *,
    dtype: str,
    tokenizer: Tokenizer,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face folder: weights, tokenizer, and the configs last.

    Args:
        folder: where, at any location.
        family: of the model.
        given: its config.json; dtype and special tokens are added.
        model: on any mesh; every process calls this, and process 0 writes.
        dtype: float32, bfloat16 or float16, of all weights in the files.
        tokenizer: of the model.
        generation: its generation_config.json, if it has one.

    Raises:
        UserError: the family has no place for a parameter, or the folder cannot be written.
    """
    write_weights(folder, family, model, dtype)
    if jax.process_index() != 0:
        return
    tokenizer.save(folder)
    if generation is not None:
        _write_json(f"{folder}/{GENERATION}", generation)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    _write_json(f"{folder}/{CONFIG}", {**ends, **given, "torch_dtype": dtype})


def _write_json(url: str, content: Mapping[str, Any]) -> None:
    sources.write_bytes(url, (json.dumps(content, indent=2) + "\n").encode())


def _gather(leaf: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """Returns one of a stack on the host."""
    if not leaf.is_fully_addressable:
        return np.asarray(_replicate(leaf, index).addressable_data(0))
    values = _buffer(leaf.shape[len(index) :], leaf.dtype)
    for shard in leaf.addressable_shards:
        box = _box(shard.index, leaf.shape)
        if shard.replica_id == 0 and _holds(box, index):
            here = tuple(i - box[dim][0] for dim, i in enumerate(index))
            inside = tuple(slice(*part) for part in box[len(index) :])
            values[inside] = _on_host(shard.data, here)
    return values


def _on_host(data: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    if next(iter(data.devices())).platform == "cpu":
        return np.asarray(data)[index]  # A view: nothing is copied.
    # Sliced on the device. JAX keeps what it has brought to the host as long as the array lives.
    return np.asarray(data[index] if index else jax.numpy.copy(data))


def _replicate(leaf: jax.Array, index: tuple[int, ...]) -> jax.Array:
    """Returns one of a stack on every device of all processes."""
    with jax.set_mesh(mesh_of(leaf)):
        return _take(len(index))(leaf, np.asarray(index, np.int32))


@functools.cache
def _take(num_stacked: int) -> Any:
    def take(leaf: jax.Array, index: jax.Array) -> jax.Array:
        for i in range(num_stacked):
            leaf = jax.lax.dynamic_index_in_dim(leaf, index[i], 0, keepdims=False)
        return jax.numpy.copy(leaf)

    return jax.jit(jax.sharding.auto_axes(take, out_sharding=PartitionSpec()))
