"""The model in a Hugging Face folder."""

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from jaxgen.data import sources
from jaxgen.formats import folder, safetensors
from jaxgen.formats.config_json import Given, name_ignored
from jaxgen.formats.families import Family, family_of
from jaxgen.models.decoder import Decoder
from jaxgen.pretrained import GenerationDefaults, Pretrained, read_json, short_hash

# What a Hugging Face folder may hold beside its weights and its config.
_SMALL_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    folder.GENERATION,
)
# Named templates beside the default one.
_TEMPLATES = "additional_chat_templates"
_GENERATION: dict[str, Any] = {
    **dict.fromkeys(("eos_token_id", "top_k", "top_p", "min_p", "repetition_penalty")),
    "do_sample": False,
    "temperature": 1.0,
}
# Of generation_config.json: where 1 means off, as 0, false and null do everywhere.
_OFF_AT_ONE = {
    *("num_beams", "num_beam_groups", "typical_p", "length_penalty", "guidance_scale"),
    *("encoder_repetition_penalty", "num_return_sequences"),
}
# What no text depends on, or, as lengths, the request says.
_LEFT_TO_OTHERS = {
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
    *("max_length", "max_new_tokens", "use_cache", "cache_implementation", "cache_config"),
    *("_from_model_config", "trust_remote_code", "return_dict_in_generate", "output_scores"),
    *("output_attentions", "output_hidden_states", "output_logits", "chat_format"),
}
# Of a file, from its end: other weights of the same shapes differ there, too.
_TAIL_BYTES = 1 << 16


class Published(Pretrained):
    """Tensors are read from the files by their bytes; nothing is converted first."""

    def __init__(self, location: str, given: dict[str, Any]):
        self.location = self.tokenizer_location = location
        self.given = given
        self.family: Family = family_of(given)
        self.config = self.family.read(given)

    @functools.cached_property
    def stored(self) -> dict[str, safetensors.Stored]:
        """The tensors of its files, whose headers are read here."""
        return safetensors.open_folder(self.location)

    @property
    def exact_location(self) -> str:
        """The folder, from anywhere on this machine."""
        return self.location if "://" in self.location else os.path.abspath(self.location)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the config, and of each file's header, size and last bytes."""
        parts = [json.dumps(self.given, sort_keys=True), repr(self.stored)]
        for url in sorted({tensor.url for tensor in self.stored.values()}):
            size = sources.size(url)
            parts.append(f"{size} {sources.read_range(url, max(0, size - _TAIL_BYTES), size)!r}")
        return short_hash("\n".join(parts).encode())

    @functools.cached_property
    def stored_dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """The dtype of most bytes; float32 for float64."""
        nbytes: Counter[str] = Counter()
        for tensor in self.stored.values():
            nbytes[tensor.dtype.name] += tensor.nbytes
        name = nbytes.most_common(1)[0][0] if nbytes else "float32"
        return name if name in ("bfloat16", "float16") else "float32"

    @functools.cached_property
    def generation(self) -> GenerationDefaults:
        """What generation_config.json says, and all ends of text that any file names."""
        return generation_of(self.published, self.config.vocab_size, self.tokenizer().eos_id)

    @functools.cached_property
    def published(self) -> Mapping[str, Any]:
        """Its config.json and its generation_config.json; see `Pretrained`."""
        said = read_json(f"{self.location}/{folder.GENERATION}")
        return {"config": self.given, "generation": said}

    def read(self, abstract_model: Decoder) -> Decoder:
        """Returns the weights; see `Pretrained`."""
        kind = jax.tree.leaves(abstract_model)[0].dtype.name
        if kind == self.dtype:
            self._name_rounded(kind)
        return folder.read_weights(self.location, self.stored, self.family, abstract_model)

    def _name_rounded(self, dtype: str) -> None:
        """Says on stderr which tensors have more bits than the dtype of most, in which all are."""
        kind = np.dtype(jax.numpy.dtype(dtype))
        rounded = [
            name
            for name, tensor in self.stored.items()
            if tensor.dtype != kind and tensor.dtype.itemsize >= kind.itemsize
        ]
        if rounded:
            what = f"{len(rounded)} tensors of other dtypes to {dtype}, such as {rounded[0]}"
            print(f"{self.location}: rounded {what}", file=sys.stderr)

    def write(self, location: str, model: Decoder, dtype: str | None = None) -> None:
        """Writes the same tensors, and copies the other files; see `Pretrained`."""
        folder.write_weights(location, self.family, model, dtype or self.stored_dtype)
        if dtype is None and self.stored_dtype != self.dtype:
            self._name_rounded(self.stored_dtype)
        if jax.process_index() != 0:
            return
        more = sources.names_in(f"{self.location}/{_TEMPLATES}")
        for name in (*_SMALL_FILES, *(f"{_TEMPLATES}/{name}" for name in more)):
            if sources.exists(f"{self.location}/{name}"):
                content = sources.read_bytes(f"{self.location}/{name}")
                sources.write_bytes(f"{location}/{name}", content)
        key = "dtype" if "dtype" in self.given else "torch_dtype"
        if dtype and self.given.get(key) != dtype:
            sources.write_json(f"{location}/{folder.CONFIG}", {**self.given, key: dtype})
            return
        content = sources.read_bytes(f"{self.location}/{folder.CONFIG}")
        sources.write_bytes(f"{location}/{folder.CONFIG}", content)


def generation_of(published: Mapping[str, Any], vocab_size: int, eos_id: int) -> GenerationDefaults:
    """Returns what a generation_config.json says, and all ends of text that either config names.

    Args:
        published: as `Pretrained.published`.
        vocab_size: of the model.
        eos_id: of its tokenizer.

    Raises:
        UserError: a value of another kind, or an end that is no token.
    """
    values = published["generation"] or {}
    said = Given(values, _GENERATION, folder.GENERATION)
    configs = (said, Given(published["config"], _GENERATION))
    ends = [token for config in configs for token in _ends(config, vocab_size)]
    stops = tuple(dict.fromkeys([*ends, eos_id]))
    if not values:
        return GenerationDefaults(stops)
    temperature, samples = said.get("temperature", float), said.get("do_sample", bool)
    top_k = said.get("top_k", int | None, least=0)
    names = ("top_p", "min_p", "repetition_penalty")
    rest = {name: said.get(name, float | None) for name in names}
    on = {key for key, x in values.items() if x and not (x == 1 and key in _OFF_AT_ONE)}
    if ignored := sorted(on - said.keys - _LEFT_TO_OTHERS):
        name_ignored(folder.GENERATION, ignored)
    return GenerationDefaults(stops, temperature if samples else 0.0, top_k, **rest)


def _ends(said: Given, vocab_size: int) -> list[int]:
    """The end-of-text ids that a config names: none, one or several."""
    found = said.get("eos_token_id", int | list | None, least=0)
    ids = found if isinstance(found, list) else [found] * (found is not None)
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise said.wrong("eos_token_id", f"token of the model's {vocab_size}")
    return ids
