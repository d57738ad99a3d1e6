"""Published model families as data: how their config.json and their tensors become ours, and back.

A family is a table of tensors and a pair of functions between config.json and `DecoderConfig`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxgen.errors import UserError
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
    theirs is [outputs, inputs], each flattened. 0: theirs is ours, flattened."""
    after: tuple[str, ...] = ()
    """Parameters whose outputs stand before ours in the same tensor (Phi-3: q, k and v are one)."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that share an architecture's code elsewhere; all of them are one decoder here."""

    architecture: str
    """As config.json names it: LlamaForCausalLM."""
    tensors: tuple[Tensor, ...]
    """Those of every variant; one whose `ours` a model has not (a tied head) is not there."""
    read: Callable[[Mapping[str, Any]], DecoderConfig]
    """From config.json; raises UserError for what the decoder cannot do."""
    write: Callable[[DecoderConfig], dict[str, Any]]
    """To config.json; `read` of it is equal exactly where the family can express the model."""


_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."
DENSE = (
    Tensor("embedding", "model.embed_tokens.weight"),
    Tensor("layers/attention_norm/scale", "model.layers.{layer}.input_layernorm.weight"),
    Tensor("layers/attention/q", _ATTENTION + "q_proj.weight", inputs=1),
    Tensor("layers/attention/k", _ATTENTION + "k_proj.weight", inputs=1),
    Tensor("layers/attention/v", _ATTENTION + "v_proj.weight", inputs=1),
    Tensor("layers/attention/o", _ATTENTION + "o_proj.weight", inputs=2),
    Tensor("layers/mlp_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight"),
    Tensor("layers/mlp/gate", _MLP + "gate_proj.weight", inputs=1),
    Tensor("layers/mlp/up", _MLP + "up_proj.weight", inputs=1),
    Tensor("layers/mlp/down", _MLP + "down_proj.weight", inputs=1),
    Tensor("norm/scale", "model.norm.weight"),
    Tensor("head", "lm_head.weight"),
)


def _read_llama(given: Mapping[str, Any]) -> DecoderConfig:
    num_heads = given["num_attention_heads"]
    return DecoderConfig(
        vocab_size=given["vocab_size"],
        num_layers=given["num_hidden_layers"],
        embed_dim=given["hidden_size"],
        num_heads=num_heads,
        num_kv_heads=given.get("num_key_value_heads") or num_heads,
        head_dim=given.get("head_dim") or given["hidden_size"] // num_heads,
        mlp_dim=given["intermediate_size"],
        max_seq_len=given["max_position_embeddings"],
        rope_theta=given.get("rope_theta", 10_000.0),
        norm_eps=given["rms_norm_eps"],
        tie_embeddings=given.get("tie_word_embeddings", False),
    )


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


FAMILIES = (Family("LlamaForCausalLM", DENSE, _read_llama, _write_llama),)


def family_of(given: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json.

    Raises:
        UserError: its architecture is none of ours; the message lists those that are.
    """
    names = given.get("architectures") or ["none"]
    for family in FAMILIES:
        if family.architecture in names:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"architecture {names[0]} is not supported; use one of {known}")


def family_for(config: DecoderConfig) -> tuple[Family, dict[str, Any]]:
    """Returns the first family that can express a model, and its config.json of it.

    Raises:
        UserError: none can.
    """
    for family in FAMILIES:
        given = family.write(config)
        if family.read(given) == config:
            return family, {"architectures": [family.architecture], **given}
    raise UserError("no published architecture has all of this model's options; keep it as a run")
