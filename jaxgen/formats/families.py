"""Published model families as data: how their config.json and their tensors become ours, and back.

A family is a table of tensors, and the options of its config.json.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxgen.errors import UserError
from jaxgen.formats import options as o
from jaxgen.formats.config_json import Given, Part, always, same
from jaxgen.formats.rope import ROPE, ROPE_BY_KIND, ROPE_UNSCALED
from jaxgen.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a parameter of ours stands in Hugging Face files: a tensor a layer (and expert)."""

    ours: str
    """As `checkpoint.tree.named_leaves` names it: layers/attention/q."""
    theirs: str
    """The tensor's name; {layer} and {expert} count from 0."""
    inputs: int = 0
    """How many of our leading dimensions, after layer and expert, are a matrix product's inputs:
    theirs is [outputs, inputs], each flattened. 0: theirs is ours, and a layer's is flattened."""
    after: tuple[str, ...] = ()
    """Parameters whose outputs stand before ours in the same tensor (Phi-3: q, k and v are one)."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that share an architecture's code elsewhere; all of them are one decoder here."""

    architecture: str
    """As config.json names it: LlamaForCausalLM."""
    model_type: str
    """As config.json names it, too: llama."""
    tensors: tuple[Tensor, ...]
    """Those of every variant; one whose `ours` a model has not (a tied head) is not there."""
    parts: tuple[Part, ...]
    """The options in config.json."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What absent keys of config.json mean, where that is not `options.DEFAULTS`."""

    def read(self, values: Mapping[str, Any]) -> DecoderConfig:
        """Returns the model of a config.json; keys that are not known are named on stderr.

        Raises:
            UserError: it has what the decoder cannot do, or lacks what it must have.
        """
        given, fields = Given(values, {**o.DEFAULTS, **self.defaults}), {}
        for part in self.parts:
            fields |= part.read(given)
        given.finish()
        return DecoderConfig(**fields)

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """Returns a config.json; `read` gives the model back where the family can express it.

        Raises:
            UserError: the architecture cannot have such a shape.
        """
        values: dict[str, Any] = {"architectures": [self.architecture]}
        # Null, or the architecture's own stands in, whose embedding has no gradient elsewhere.
        values |= {"model_type": self.model_type, "pad_token_id": None}
        for part in self.parts:
            values |= part.write(config)
        return values


_LAYER = "model.layers.{layer}."
_EMBEDDING = (
    Tensor("embedding", "model.embed_tokens.weight"),
    Tensor("norm/scale", "model.norm.weight"),
    Tensor("head", "lm_head.weight"),
)
_PRE_NORMS = (
    Tensor("layers/attention_norm/scale", _LAYER + "input_layernorm.weight"),
    Tensor("layers/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight"),
)
_POST_NORMS = (
    Tensor("layers/attention_post_norm/scale", _LAYER + "post_attention_layernorm.weight"),
    Tensor("layers/mlp_post_norm/scale", _LAYER + "post_feedforward_layernorm.weight"),
)
_PRE_POST_NORMS = (
    Tensor("layers/attention_norm/scale", _LAYER + "input_layernorm.weight"),
    Tensor("layers/mlp_norm/scale", _LAYER + "pre_feedforward_layernorm.weight"),
    *_POST_NORMS,
)
_OUT = Tensor("layers/attention/o", _LAYER + "self_attn.o_proj.weight", inputs=2)
_ATTENTION = (
    *(Tensor(f"layers/attention/{x}", f"{_LAYER}self_attn.{x}_proj.weight", 1) for x in "qkv"),
    _OUT,
)
_QKV_BIAS = tuple(
    Tensor(f"layers/attention/{x}_bias", f"{_LAYER}self_attn.{x}_proj.bias") for x in "qkv"
)
_QK_NORM = tuple(
    Tensor(f"layers/attention/{x}_norm/scale", f"{_LAYER}self_attn.{x}_norm.weight") for x in "qk"
)
_DOWN = Tensor("layers/mlp/down", _LAYER + "mlp.down_proj.weight", inputs=1)
_MLP = (
    *(Tensor(f"layers/mlp/{x}", f"{_LAYER}mlp.{x}_proj.weight", 1) for x in ("gate", "up")),
    _DOWN,
)
DENSE = (*_EMBEDDING, *_PRE_NORMS, *_ATTENTION, *_MLP)


def _experts(block: str, **names: str) -> tuple[Tensor, ...]:
    """The tensors of a layer's experts: ours="theirs"."""
    router = Tensor("layers/mlp/router", f"{_LAYER}{block}.gate.weight", inputs=1)
    path = f"{_LAYER}{block}.experts.{{expert}}"
    return router, *(
        Tensor(f"layers/mlp/{ours}", f"{path}.{theirs}.weight", inputs=1)
        for ours, theirs in names.items()
    )


_COMMON = (*o.COMMON, ROPE, o.activation("hidden_act"))
LLAMA = Family("LlamaForCausalLM", "llama", DENSE, (*_COMMON, o.MLP, o.WHOLE_HEADS))
MISTRAL = Family(
    "MistralForCausalLM",
    "mistral",
    DENSE,
    (*_COMMON, o.MLP, o.WINDOW),
    {"num_key_value_heads": 8, "sliding_window": 4096},
)

_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN2 = Family(
    "Qwen2ForCausalLM",
    "qwen2",
    (*DENSE, *_QKV_BIAS),
    (*_COMMON, o.MLP, o.WINDOW_AFTER, o.USE_WINDOW, always(qkv_bias=True)),
    {"num_key_value_heads": 32, **_QWEN_WINDOW},
)
QWEN3 = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    (*DENSE, *_QK_NORM),
    (*_COMMON, o.MLP, o.WINDOW_AFTER, o.USE_WINDOW, always(qk_norm=True)),
    {"num_key_value_heads": 32, "head_dim": 128, **_QWEN_WINDOW},
)
QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    (
        *(*_EMBEDDING, *_PRE_NORMS, *_ATTENTION, *_QK_NORM),
        *_experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    (
        *(*_COMMON, same(int, mlp_dim="moe_intermediate_size")),
        *(o.WINDOW, o.USE_WINDOW, o.experts("num_experts", "norm_topk_prob"), always(qk_norm=True)),
    ),
    {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "moe_intermediate_size": 768,
        "num_key_value_heads": 4,
        **_QWEN_WINDOW,
    },
)
MIXTRAL = Family(
    "MixtralForCausalLM",
    "mixtral",
    (
        *(*_EMBEDDING, *_PRE_NORMS, *_ATTENTION),
        *_experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
    (*_COMMON, o.MLP, o.WINDOW, o.experts("num_local_experts")),
    {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
    },
)

_GEMMA = (
    *(*o.COMMON, o.MLP, o.activation("hidden_activation"), o.WINDOW_EVERY, o.SOFT_CAPS),
    *(o.SCORE_SCALE, o.EMBED_SCALE, o.WHOLE_HEADS),
    always(norms="pre_post", norm_plus_one=True),
)
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "sliding_window_pattern": None,
}
_GEMMA_TENSORS = (*_EMBEDDING, *_PRE_POST_NORMS, *_ATTENTION, *_MLP)
GEMMA2 = Family(
    "Gemma2ForCausalLM",
    "gemma2",
    _GEMMA_TENSORS,
    (*_GEMMA, ROPE),
    {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "_sliding_window_pattern": 2,
        **_GEMMA_DEFAULTS,
    },
)
GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    (*_GEMMA_TENSORS, *_QK_NORM),
    (*_GEMMA, ROPE_BY_KIND, always(qk_norm=True)),
    {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "_sliding_window_pattern": 6,
        **_GEMMA_DEFAULTS,
    },
)

OLMO2 = Family(
    "Olmo2ForCausalLM",
    "olmo2",
    (*_EMBEDDING, *_POST_NORMS, *_ATTENTION, *_QK_NORM, *_MLP),
    (*_COMMON, o.MLP, always(norms="post", qk_norm="all")),
    {"rms_norm_eps": 1e-5},
)


def _fused(theirs: str, *ours: str) -> tuple[Tensor, ...]:
    """Products of the same input whose outputs stand one after the other in one tensor."""
    return tuple(
        Tensor(name, _LAYER + theirs, inputs=1, after=ours[:i]) for i, name in enumerate(ours)
    )


PHI3 = Family(
    "Phi3ForCausalLM",
    "phi3",
    (
        *(*_EMBEDDING, *_PRE_NORMS, _OUT, _DOWN),
        *_fused("self_attn.qkv_proj.weight", *(f"layers/attention/{x}" for x in "qkv")),
        *_fused("mlp.gate_up_proj.weight", "layers/mlp/gate", "layers/mlp/up"),
    ),
    (*o.COMMON, ROPE_UNSCALED, o.MLP, o.activation("hidden_act"), o.WINDOW),
    {"rms_norm_eps": 1e-5, "sliding_window": None},
)

# In the order in which `family_for` asks them: the plainest that can express a model has it.
FAMILIES = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE),
    *(GEMMA2, GEMMA3, OLMO2, PHI3),
)


def family_of(given: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json.

    Raises:
        UserError: its architecture is none of ours; the message lists those that are.
    """
    said = Given(given, {"architectures": None, "model_type": None})
    names, kind = said.get("architectures", list | None), said.get("model_type", str | None)
    for family in FAMILIES:
        if family.architecture in names if names else family.model_type == kind:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(
        f"architecture {names[0] if names else kind} is not supported; use one of {known}"
    )


def family_for(config: DecoderConfig) -> tuple[Family, dict[str, Any]]:
    """Returns the first family that can express a model, and its config.json of it.

    Weights of a router's training losses need not be: only the load-balance weight has a key.

    Raises:
        UserError: none can.
    """
    for family in FAMILIES:
        try:
            values = family.write(config)
            found = family.read(values)
        except UserError:
            continue
        if o.used(found) == o.used(config):
            return family, values
    raise UserError("no published architecture has all of this model's options; keep it as a run")
