"""Reading and writing config.json, option by option, without overlooking a key.

The format is that of transformers: read as its releases 4 and 5 write it, and written as 4 does,
which both read.
"""

import dataclasses
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
    """A config.json that is being read: an absent key has its family's default."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.values, self.defaults = values, defaults
        self.keys: set[str] = set()

    def get(self, key: str, kind: Any) -> Any:
        """Returns the value of a key, which is of this type.

        Raises:
            UserError: it is not, or the key is absent and has no default.
        """
        self.keys.add(key)
        if key not in self.values and key not in self.defaults:
            raise UserError(f"config.json has no {key}; without it the model is not known")
        value = self.values.get(key, self.defaults.get(key))
        if type(value) is int and not isinstance(value, kind):
            value = float(value)
        if not isinstance(value, kind) or (type(value) is bool and kind is not bool):
            raise UserError(f"config.json: {key}={value!r} is no {getattr(kind, '__name__', kind)}")
        return value

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
            print(f"config.json: ignored {', '.join(unknown)}: not known", file=sys.stderr)


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
