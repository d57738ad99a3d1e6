"""Reading and writing config.json, option by option, without overlooking a key.

The format is that of transformers: read as its releases 4 and 5 write it, and written as 4 does,
which both read.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxgen.errors import UserError
from jaxgen.models.config import DecoderConfig

# What a model of any family computes only with this value, or without the key. Of a family that
# reads the key, this says nothing.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "layer_types": (),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, 1.0),
    "use_bidirectional_attention": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "clip_qkv": (),
    "quantization_config": (),
}
# What changes nothing that is computed from tokens, or only the random noise of training. The
# activation is Gemma's, which reads another key.
HARMLESS = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype"),
    *("_name_or_path", "auto_map", "transformers.js_config", "is_llama_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "initializer_range", "pretraining_tp"),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "router_jitter_noise"),
    *("output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "add_cross_attention"),
    *("problem_type", "id2label", "label2id", "unsloth_fixed", "unsloth_version"),
    *("_attn_implementation", "_attn_implementation_autoset", "max_window_layers"),
    *("use_sliding_window", "intermediate_size", "hidden_act", "rope_local_base_freq"),
    *("original_max_position_embeddings", "sliding_window_pattern", "_sliding_window_pattern"),
}


class Given:
    """A JSON file that is being read: a key that is absent, or null for no reason, is its default.

    Numbers may be written as the other kind, and are finite; an int has 32 bits, as positions do.
    """

    def __init__(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any], file: str = "config.json"
    ):
        self.values, self.defaults, self.file = values, defaults, file
        self.keys: set[str] = set()

    def get(self, key: str, kind: Any, least: int = 1) -> Any:
        """Returns the value of a key, which is of this type; an int is at least `least`.

        Raises:
            UserError: it is not, or the key is absent and has no default.
        """
        self.keys.add(key)
        if key not in self.values and key not in self.defaults:
            raise UserError(f"{self.file} has no {key}; without it the model is not known")
        value = self.values.get(key)
        if key not in self.values or (value is None and not isinstance(None, kind)):
            value = self.defaults.get(key)
        found = value
        if type(value) is int and isinstance(0.0, kind) and not isinstance(0, kind):
            found = float(str(value))  # Infinity beyond 1e308, where float(value) raises.
        elif type(value) is float and value.is_integer() and not isinstance(0.0, kind):
            found = int(value)
        wanted = getattr(kind, "__name__", str(kind))
        if type(found) is int and isinstance(found, kind):
            if not least <= found < 2**31:
                raise self.wrong(key, f"{wanted} of at least {least} and below 2**31")
        elif not isinstance(found, kind) or (type(found) is bool and kind is not bool):
            raise self.wrong(key, wanted)
        elif type(found) is float and not math.isfinite(found):
            raise self.wrong(key, "finite number")
        return found

    def wrong(self, key: str, wanted: str) -> UserError:
        """Returns the error about a value that is not what is wanted."""
        return UserError(f"{self.file}: {key}={self.values.get(key)!r} is no {wanted}; correct it")

    def finish(self) -> None:
        """Checks the keys that no one asked for, and names those that are not known on stderr.

        Raises:
            UserError: one of them changes what is computed.
        """
        rest = {key: value for key, value in self.values.items() if key not in self.keys}
        for key, allowed in FIXED.items():
            if rest.get(key) is not None and rest[key] not in allowed:
                raise refused(key, rest[key])
        unknown = sorted(rest.keys() - FIXED.keys() - HARMLESS)
        if unknown:
            name_ignored(self.file, unknown)


def name_ignored(file: str, keys: Sequence[str]) -> None:
    """Says on stderr which keys of a file are not read."""
    print(f"{file}: ignored {', '.join(keys)}: not known", file=sys.stderr)


def refused(key: str, value: Any, known: Sequence[str] = ()) -> UserError:
    """Returns the error about an option that the decoder has not."""
    instead = f"; use one of {', '.join(known)}" if known else ""
    return UserError(f"config.json: {key}={value!r} is not supported{instead}")


@dataclasses.dataclass(frozen=True)
class Part:
    """Some options of a model: as config.json has them, and as fields of DecoderConfig."""

    read: Callable[[Given], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}


def same(kind: Any, **names: str) -> Part:
    """Options that differ in name alone: ours="theirs"."""
    return Part(
        lambda given: {ours: given.get(theirs, kind) for ours, theirs in names.items()},
        lambda config: {theirs: getattr(config, ours) for ours, theirs in names.items()},
    )


def always(**fields: Any) -> Part:
    """What all models of a family have, and config.json does not say."""
    return Part(lambda given: fields)
