"""Reading GGUF, the format of llama.cpp: key-value pairs, then tensors, mostly quantised."""

from typing import Any

import gguf
import numpy as np

from jaxgen.errors import UserError

_MISSING: Any = object()


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
            reader = gguf.GGUFReader(path)
            self.facts = {key: field.contents() for key, field in reader.fields.items()}
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; check the path") from None
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise UserError(
                f"{path} is not a GGUF file, or is cut short ({error}); download it again"
            ) from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.architecture = self.facts.get("general.architecture")

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """Returns what the file says of the model, by the key without its architecture.

        Raises:
            UserError: it says nothing, and there is no default.
        """
        found = self.facts.get(f"{self.architecture}.{key}", default)
        if found is _MISSING:
            raise UserError(f"it says no {self.architecture}.{key}; convert the model again")
        # Stored as fp32: the number of a config.json is the shortest that gives it.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    @property
    def heads(self) -> tuple[int, int]:
        """Attention heads, and those of keys and values."""
        heads = self.get("attention.head_count")
        return heads, self.get("attention.head_count_kv", heads)

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
            return gguf.dequantize(data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"tensor {name} is quantised as {tensor.tensor_type.name}, which is not "
                "supported; use a file of another quantisation, such as Q8_0"
            ) from None
