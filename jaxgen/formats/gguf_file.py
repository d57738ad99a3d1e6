"""Reading GGUF, the format of llama.cpp: key-value pairs, then tensors, mostly quantised."""

from typing import Any

import numpy as np

from jaxgen.errors import UserError
from jaxgen.formats.config_json import name_ignored

_MISSING: Any = object()
# Factors that no architecture here has, and the values with which they do nothing.
_FIXED = {
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
}
# Said by the shapes of tensors, or of no effect.
_HARMLESS = {"vocab_size", "attention.value_length", "rope.scaling.finetuned", "tensor_data_layout"}


class GGUFFile:
    """A GGUF file that is open.

    Attributes:
        facts: what it says, by key.
        shapes: of its tensors, by name; the outermost dimension first.
        architecture: as it names it.
    """

    def __init__(self, path: str):
        """Reads the header.

        Raises:
            UserError: it is no GGUF file, or is cut short.
        """
        self.path = path
        if "://" in path:
            raise UserError(f"{path} is a URL; GGUF files are read in place, so copy it here first")
        try:
            import gguf
        except ImportError:
            raise UserError(
                f"{path} needs gguf to be read; install it with: pip install 'jaxgen[gguf]'"
            ) from None
        self._dequantize = gguf.dequantize
        try:
            reader = gguf.GGUFReader(path)
            self.facts = {key: field.contents() for key, field in reader.fields.items()}
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; check the path") from None
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise UserError(
                f"{path} is not a GGUF file, or is cut short ({error}); download it again"
            ) from None
        if (count := self.facts.get("split.count", 1)) > 1:
            raise UserError(
                f"{path} is one of {count} files of a model; join them with llama.cpp's "
                "llama-gguf-split --merge"
            )
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.architecture = self.facts.get("general.architecture")
        self._keys: set[str] = set()

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """Returns what the file says of the model, by the key without its architecture.

        Raises:
            UserError: it says nothing, and there is no default.
        """
        self._keys.add(key)
        found = self.facts.get(f"{self.architecture}.{key}", default)
        if found is _MISSING:
            raise UserError(f"it says no {self.architecture}.{key}; convert the model again")
        # Stored as fp32: the number of a config.json is the shortest that gives it.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    def finish(self) -> None:
        """Names on stderr what the file says of the model and no one asked for.

        Raises:
            UserError: it changes what the model computes.
        """
        start = f"{self.architecture}."
        said = {key.removeprefix(start) for key in self.facts if key.startswith(start)}
        rest = said - self._keys - _HARMLESS
        for key in sorted(rest & _FIXED.keys()):
            if (value := self.get(key)) not in _FIXED[key]:
                raise UserError(f"{start}{key}={value} is not supported; use another model")
        if ignored := sorted(start + key for key in rest - _FIXED.keys()):
            name_ignored(self.path, ignored)

    @property
    def heads(self) -> tuple[int, int]:
        """Attention heads, and those of keys and values.

        Raises:
            UserError: they are no numbers: some architectures have one for each layer.
        """
        heads = self.get("attention.head_count")
        found = heads, self.get("attention.head_count_kv", heads)
        if not all(isinstance(number, int) and number > 0 for number in found):
            raise UserError(
                f"heads={found[0]} kv_heads={found[1]} are not supported; use a number above 0"
            )
        return found

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.get("attention.key_length", self.get("embedding_length") // self.heads[0])

    def weights(self, name: str, expert: int | None = None) -> np.ndarray:
        """Returns a tensor, or one expert's part of it, in fp32.

        Raises:
            UserError: it is quantised in a way that cannot be read.
        """
        tensor = self._tensors[name]
        data = tensor.data if expert is None else tensor.data[expert]
        try:
            return self._dequantize(data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"tensor {name} is quantised as {tensor.tensor_type.name}, which is not "
                "supported; use a file of another quantisation, such as Q8_0"
            ) from None
