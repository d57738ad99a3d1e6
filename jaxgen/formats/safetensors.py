"""Safetensors files: a header in JSON, then the tensors, of which any part can be read by itself.

The first 8 bytes are the header's length, little-endian. The header is padded with spaces to a
multiple of 8 bytes; after it the tensors stand without gaps.

Source: github.com/huggingface/safetensors, README.md and safetensors/src/tensor.rs.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from jaxgen.data import sources
from jaxgen.errors import UserError
from jaxgen.progress import progress

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
# In the order in which the library lays tensors out.
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {np.dtype(jnp.dtype(name)): code for code, name in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # The library's own limit.
_AGAIN = "copy or download it again"


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a tensor is."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Stored(Spec):
    """A tensor in a file."""

    url: str
    begin: int
    """The byte of the file at which its elements begin."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the elements `start` to `stop`, counted through row by row.

        Raises:
            UserError: the file cannot be read, or has become shorter.
        """
        width = self.dtype.itemsize
        raw = sources.read_range(self.url, self.begin + start * width, self.begin + stop * width)
        if len(raw) != (stop - start) * width:
            raise UserError(f"{self.url} has changed while it was read; {_AGAIN}")
        return np.frombuffer(raw, self.dtype)


def open_folder(folder: str) -> dict[str, Stored]:
    """Returns all tensors of a model's folder; reads the headers of its files and checks them.

    Raises:
        UserError: there are none, a file is missing, cut short or inconsistent, or a tensor is
            there twice.
    """
    # In the order in which transformers looks for them.
    if sources.exists(f"{folder}/{WEIGHTS}"):
        return read_header(f"{folder}/{WEIGHTS}")
    if not sources.exists(f"{folder}/{INDEX}"):
        raise UserError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; give a folder with safetensors files"
        )
    places = _parse(f"{folder}/{INDEX}", sources.read_bytes(f"{folder}/{INDEX}"), _places)
    files = sorted(set(places.values()))
    # Several at once: a header is three requests to a store.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        there = pool.map(sources.exists, [f"{folder}/{file}" for file in files])
        if missing := [file for file, found in zip(files, there, strict=True) if not found]:
            raise UserError(f"{folder} has no {missing[0]}, which its {INDEX} names; {_AGAIN}")
        headers = pool.map(read_header, [f"{folder}/{file}" for file in files])
        found: dict[str, Stored] = {}
        for file, tensors in zip(files, headers, strict=True):
            for name, tensor in tensors.items():
                if name in found:
                    raise UserError(
                        f"tensor {name} is in {found[name].url} and in {file}; {_AGAIN}"
                    )
                found[name] = tensor
    for name, file in places.items():
        if name not in found or found[name].url != f"{folder}/{file}":
            raise UserError(f"{folder}/{file} has no tensor {name}, as {INDEX} says; {_AGAIN}")
    return found


def read_header(url: str) -> dict[str, Stored]:
    """Returns the tensors of one file.

    Raises:
        UserError: it is no such file, is cut short, or contradicts itself.
    """
    size = sources.size(url)
    length = int.from_bytes(sources.read_range(url, 0, 8), "little") if size >= 8 else size
    begin = 8 + length
    if begin > size or length > _MAX_HEADER_BYTES:
        raise UserError(f"{url} is cut short, or no safetensors file ({size} bytes); {_AGAIN}")
    raw = sources.read_range(url, 8, begin)
    tensors = _parse(url, raw, lambda header: _tensors(url, header, begin))
    end = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != end:
            raise UserError(
                f"{url}: tensor {name} begins at byte {tensor.begin} where {end} is its turn; "
                f"{_AGAIN}"
            )
        end += tensor.nbytes
    if end != size:
        raise UserError(f"{url} has {size} bytes and its tensors end at byte {end}; {_AGAIN}")
    return tensors


T = TypeVar("T")


def _parse(url: str, raw: bytes, read: Callable[[Any], T]) -> T:
    """Returns what `read` makes of JSON, of which nothing is believed."""
    try:
        return read(json.loads(raw, object_pairs_hook=_without_repeats))
    except UserError as error:
        raise UserError(f"{url}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{url} does not say where tensors are ({error!r}); {_AGAIN}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [name for name, n in collections.Counter(name for name, _ in pairs).items() if n > 1]
    if repeated:
        raise UserError(f"{repeated[0]} is named twice; {_AGAIN}")
    return dict(pairs)


def _places(index: Any) -> dict[str, str]:
    places = index["weight_map"]
    if outside := [file for file in places.values() if os.path.basename(file) != file]:
        raise UserError(f"{outside[0]} is not in the folder; {_AGAIN}")
    return dict(places)


def _tensors(url: str, header: Any, begin: int) -> dict[str, Stored]:
    names = [name for name in header if name != "__metadata__"]
    return {name: _stored(url, name, header[name], begin) for name in names}


def _stored(url: str, name: str, entry: Mapping[str, Any], begin: int) -> Stored:
    code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if code not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"tensor {name} is of dtype {code}; save the model as one of {known}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name}: {shape}, {start}, {stop}")
    tensor = Stored(np.dtype(jnp.dtype(DTYPES[code])), shape, url, begin + start)
    if stop - start != tensor.nbytes:
        raise UserError(f"tensor {name}, {code}{list(shape)}, has {stop - start} bytes; {_AGAIN}")
    return tensor


def write_files(
    folder: str,
    specs: Mapping[str, Spec],
    write: Callable[[Any, str], None],
    *,
    writes: bool = True,
) -> None:
    """Writes tensors into as many files as it takes, and an index if those are several.

    Args:
        folder: at any location.
        specs: of the tensors, by their names.
        write: gives a file a tensor's elements; called for each tensor, one after the other.
        writes: whether this process has the files; for others `write` gets None.

    Raises:
        UserError: the folder cannot be written.
    """
    files = split(specs, MAX_FILE_BYTES)
    done = 0
    with progress(f"writing {folder}", _nbytes(specs)) as show:
        for name, tensors in files.items():
            opened = sources.writing(f"{folder}/{name}") if writes else contextlib.nullcontext()
            with opened as file:
                if file:
                    file.write(make_header(tensors))
                for tensor, spec in tensors.items():
                    write(file, tensor)
                    done += spec.nbytes
                    show(done)
    if writes and len(files) > 1:
        sources.write_bytes(f"{folder}/{INDEX}", make_index(files))


def cast(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a tensor's values in the dtype of its file.

    Raises:
        UserError: float16 has not all of them.
    """
    with np.errstate(over="ignore"):
        found = values.astype(dtype, copy=False)
    if dtype == np.float16 and not np.isfinite(found).all():
        raise UserError(f"tensor {name} has values that float16 has not; use bfloat16 or float32")
    return found


def in_order(tensors: Mapping[str, Spec]) -> dict[str, Spec]:
    """Returns tensors in the order in which a file has them: by dtype, then by name."""
    ranks = {jnp.dtype(name): rank for rank, name in enumerate(DTYPES.values())}
    return dict(sorted(tensors.items(), key=lambda item: (ranks[item[1].dtype], item[0])))


def make_header(tensors: Mapping[str, Spec]) -> bytes:
    """Returns what stands before the tensors of a file, which must be in order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        entries[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start, stop),
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def split(tensors: Mapping[str, Spec], max_bytes: int) -> dict[str, dict[str, Spec]]:
    """Returns file name -> its tensors in order; one file, or numbered ones of at most `max_bytes`.

    A tensor that is larger has a file of its own.
    """
    groups: list[dict[str, Spec]] = [{}]
    left = max_bytes
    for name, tensor in tensors.items():
        if groups[-1] and tensor.nbytes > left:
            groups.append({})
            left = max_bytes
        groups[-1][name] = tensor
        left -= tensor.nbytes
    if len(groups) == 1:
        return {WEIGHTS: in_order(tensors)}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": in_order(group)
        for number, group in enumerate(groups, start=1)
    }


def make_index(files: Mapping[str, Mapping[str, Spec]]) -> bytes:
    """Returns model.safetensors.index.json: the file of every tensor."""
    places = {name: file for file, tensors in files.items() for name in tensors}
    total = sum(_nbytes(tensors) for tensors in files.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _nbytes(tensors: Mapping[str, Spec]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
