"""Hugging Face folders: weights from files right into their shards, and back.

Nothing is held twice: a tensor comes in parts of a few megabytes, each of which is turned and cast
on its way to all shards that hold some of it. Of a stack of layers the host holds only some at a
time, which are written into the devices' shards.
"""

import concurrent.futures
import functools
import gc
import itertools
import math
import mmap
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen.checkpoint.tree import mesh_of
from jaxgen.data import sources
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.formats import safetensors
from jaxgen.formats.families import Family
from jaxgen.formats.layout import Place, check, places_of, shapes_of, tied
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
_Fill = Callable[[Place, Mapping[Box, np.ndarray]], None]
"""Reads what some boxes of a parameter hold."""


def read_weights(
    folder: str, stored: Mapping[str, Stored], family: Family, model: Decoder
) -> Decoder:
    """Returns the weights in the shapes, dtypes and shardings of an abstract model.

    Each process reads what its devices hold, every tensor once. Beside the model the host holds
    at most as much as the largest tensor.

    Raises:
        UserError: the files and the model disagree; then nothing has been read, but a table that
            should be tied.
    """
    check(folder, stored, family, model)
    places = places_of(family, model)
    total, done = sum(tensor.nbytes for tensor in stored.values()), 0
    most = max(place.nbytes for place in places)
    with (
        progress(f"reading {folder}", total) as show,
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
    ):

        def fill(place: Place, buffers: Mapping[Box, np.ndarray]) -> None:
            nonlocal done
            for nbytes in pool.map(lambda part: part.copy(buffers), _parts(place, stored, buffers)):
                done += nbytes
                show(done)

        if (table := tied(family, model)) is not None:
            _check_same(stored, *table, pool)
        leaves = [_read(place, most // place.nbytes, fill) for place in places]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def _check_same(
    stored: Mapping[str, Stored], name: str, other: str, pool: concurrent.futures.Executor
) -> None:
    """Checks that a tensor equals another, of which it is a copy where it is there."""
    if name not in stored:
        return
    one, two = stored[name], stored[other]
    size, step = math.prod(one.shape), max(1, _CHUNK_BYTES // two.dtype.itemsize)

    kind = one.dtype if one.dtype == two.dtype else np.dtype(np.float32)

    def same(start: int) -> bool:
        stop = min(start + step, size)
        values, others = (x.read(start, stop).astype(kind, copy=False) for x in (one, two))
        return np.array_equal(values, others)

    if one.shape != two.shape or not all(pool.map(same, range(0, size, step))):
        raise UserError(
            f"tensor {name} differs from {other}, to which tie_word_embeddings ties it; set that "
            "to false in config.json, or remove the tensor"
        )


def _read(place: Place, count: int, fill: _Fill) -> jax.Array:
    """Returns a parameter, of whose stack the host holds at most `count` tensors at a time."""
    shape, sharding = place.leaf.shape, place.leaf.sharding
    shard = sharding.shard_shape(shape)
    block = _block(shard[: place.num_stacked], count)
    sizes = (*block, *shard[len(block) :])
    if sizes == shard:
        return _read_block(place, (0,) * len(shape), sizes, fill)
    zeros = functools.partial(jax.numpy.zeros, shape, place.leaf.dtype)
    # Not by `device=`, which makes one shard and copies it to all.
    leaf = jax.jit(zeros, out_shardings=sharding)()
    for starts in itertools.product(*map(range, (0,) * len(shape), shard, sizes)):
        # No name is given to a block, so that it is gone before the next one is read.
        leaf = _insert(sharding)(
            leaf, _read_block(place, starts, sizes, fill), np.asarray(starts, np.int32)
        )
        jax.block_until_ready(leaf)
        gc.collect(0)  # JAX lets go of NumPy's memory when Python collects.
    return leaf


def _read_block(
    place: Place, starts: Sequence[int], sizes: tuple[int, ...], fill: _Fill
) -> jax.Array:
    """Returns the part of every shard that starts there and has these sizes, as one array."""
    shape, sharding = place.leaf.shape, place.leaf.sharding
    # Boxes with the same part of the stack are read together, for tensors have rows of all.
    stages: dict[Box, dict[Box, list[jax.Device]]] = defaultdict(lambda: defaultdict(list))
    for device, slices in sharding.addressable_devices_indices_map(shape).items():
        firsts = [
            first + start for (first, _), start in zip(_box(slices, shape), starts, strict=True)
        ]
        box = tuple((first, first + size) for first, size in zip(firsts, sizes, strict=True))
        stages[box[: place.num_stacked]][box].append(device)
    arrays = []
    for devices in stages.values():
        buffers = {box: _buffer(sizes, place.leaf.dtype) for box in devices}
        fill(place, buffers)
        while buffers:
            box, buffer = buffers.popitem()
            # On CPU these are the buffer, into which JAX does not write when they are donated.
            arrays += [jax.device_put(buffer, device) for device in devices[box]]
            jax.block_until_ready(arrays)
    counts = map(operator.floordiv, shape, sharding.shard_shape(shape))
    return jax.make_array_from_single_device_arrays(
        tuple(map(operator.mul, counts, sizes)), sharding, arrays
    )


def _block(stack: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Returns how many of each dimension of a stack to read at a time: divisors of it."""
    block = []
    for size in reversed(stack):
        block.append(max(n for n in range(1, min(size, count) + 1) if size % n == 0))
        count = max(1, count // size) if block[-1] == size else 1
    return tuple(reversed(block))


@functools.cache
def _insert(sharding: NamedSharding) -> Any:
    """Returns a program that writes a block into the shards of a stack, which it is given."""
    spec = sharding.spec
    insert = jax.shard_map(
        lambda stack, some, at: jax.lax.dynamic_update_slice(stack, some, list(at)),
        mesh=sharding.mesh,
        in_specs=(spec, spec, PartitionSpec()),
        out_specs=spec,
    )
    return jax.jit(insert, donate_argnums=0)


def _buffer(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array whose memory goes back when it is freed: malloc keeps what is below 32 MB."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return np.frombuffer(memory, dtype).reshape(shape)


def _box(slices: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(one.indices(size)[:2] for one, size in zip(slices, shape, strict=True))


class _Part(NamedTuple):
    """A range of a tensor of theirs, and the place it belongs to."""

    place: Place
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


def _chunks(place: Place, start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Cuts a range of the first output dimension in parts of a few megabytes."""
    one = math.prod(place.outputs[1:]) * math.prod(place.inputs) * width
    step = max(1, _CHUNK_BYTES // one)
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)


def _holds(box: Box, index: tuple[int, ...]) -> bool:
    return all(start <= i < stop for i, (start, stop) in zip(index, box, strict=False))


def _bits(values: np.ndarray) -> np.ndarray:
    """The same memory as integers: NumPy copies them three times as fast as bfloat16."""
    return values.view(f"u{values.dtype.itemsize}")


def _parts(place: Place, stored: Mapping[str, Stored], boxes: Iterable[Box]) -> Iterator[_Part]:
    """Cuts what some boxes of one part of the stack hold."""
    boxes = list(boxes)
    stack, first = boxes[0][: place.num_stacked], place.num_stacked + len(place.inputs)
    low, high = min(box[first][0] for box in boxes), max(box[first][1] for box in boxes)
    for index in itertools.product(*(range(*part) for part in stack)):
        tensor = stored[place.name(index)]
        for start, stop in _chunks(place, low, high, tensor.dtype.itemsize):
            yield _Part(place, tensor, index, start, stop)


def write_weights(folder: str, family: Family, model: Decoder, dtype: str) -> None:
    """Writes the weights of a model as safetensors files, one tensor of theirs at a time.

    Every process calls this, and process 0 writes.

    Raises:
        UserError: the family has no place for a parameter, or the folder cannot be written.
    """
    places, kind = places_of(family, model), np.dtype(jax.numpy.dtype(dtype))
    specs = {name: Spec(kind, shape) for name, shape in sorted(shapes_of(places).items())}
    made_of: dict[str, list[tuple[Place, tuple[int, ...]]]] = defaultdict(list)
    for place in sorted(places, key=lambda place: place.rows_before):
        for index in np.ndindex(place.stack):
            made_of[place.name(index)].append((place, index))

    def write(file: Any, tensor: str) -> None:
        for place, index in made_of[tensor]:
            # No name is given, so that it is gone before the next one is gathered.
            _write_rows(file, tensor, place, _gather(place.leaf, index), kind)

    safetensors.write_files(folder, specs, write, writes=jax.process_index() == 0)


def _write_rows(file: Any, name: str, place: Place, values: np.ndarray, dtype: np.dtype) -> None:
    """Writes one of a stack in the order of their tensor; without a file, nothing."""
    if file is None:
        return
    turned = _bits(values).transpose(place.turned)
    for start, stop in _chunks(place, 0, len(turned), values.dtype.itemsize):
        rows = np.ascontiguousarray(turned[start:stop]).reshape(-1).view(values.dtype)
        file.write(safetensors.cast(name, rows, dtype).view(np.uint8).data)


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
        given: its config.json; the dtype is set, and special tokens where there are none.
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
        sources.write_json(f"{folder}/{GENERATION}", generation)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    said = {key: value for key, value in given.items() if value is not None or key not in ends}
    sources.write_json(f"{folder}/{CONFIG}", {**ends, **said, "torch_dtype": dtype})


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
