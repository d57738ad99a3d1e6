"""What a GGUF file says of its model, as config.json says it; and where its tensors go."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from jaxgen.errors import UserError
from jaxgen.formats.gguf_file import GGUFFile

Dtype = Literal["float32", "bfloat16", "float16"]

# GGUF's names of tensors, without blk.N and .weight -> Hugging Face's.
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
_QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
# Angles that are computed anew; where they stand for a scaling, `_rope_scaling` has read it.
LEFT_OUT = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How an architecture of GGUF stands in Hugging Face's files."""

    name: str
    model_type: str
    tensors: Mapping[str, str]
    """Of a layer."""
    config: Callable[[GGUFFile], dict[str, Any]] = lambda file: {"hidden_act": "silu"}
    """What config.json says besides what all say."""
    interleaved: bool = False
    """Whether the two halves that rotate together stand in neighbouring rows of q and k."""
    norm_offset: int = 0
    """What is added to norm weights in GGUF."""


def _experts(count: str) -> Callable[[GGUFFile], dict[str, Any]]:
    return lambda file: {
        "hidden_act": "silu",
        count: file.get("expert_count"),
        "num_experts_per_tok": file.get("expert_used_count"),
    }


def _qwen3_moe(file: GGUFFile) -> dict[str, Any]:
    width = file.get("expert_feed_forward_length")
    return {
        **_experts("num_experts")(file),
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(file: GGUFFile) -> dict[str, Any]:
    # The largest of each generation divides scores by the root of another number than head_dim,
    # which GGUF does not say. Source: llama.cpp, src/models/gemma2.cpp and gemma3.cpp.
    largest = file.get("block_count") == (46 if file.architecture == "gemma2" else 62)
    scale = file.get("embedding_length") // file.heads[0] if largest else file.head_dim
    config = {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": file.get("attention.sliding_window"),
        "query_pre_attn_scalar": scale,
        "attn_logit_softcapping": file.get("attn_logit_softcapping", None),
        "final_logit_softcapping": file.get("final_logit_softcapping", None),
    }
    if file.architecture == "gemma3":
        config["rope_local_base_freq"] = file.get("rope.freq_base_swa", 10_000.0)
    return config


_LLAMA = Architecture("LlamaForCausalLM", "llama", _BLOCK, interleaved=True)
_MIXTRAL = Architecture(
    "MixtralForCausalLM",
    "mixtral",
    _BLOCK | _MIXTRAL_EXPERTS,
    _experts("num_local_experts"),
    interleaved=True,
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", _BLOCK),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", _BLOCK),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM", "qwen3_moe", _BLOCK | _QWEN_EXPERTS, _qwen3_moe
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", "gemma2", _BLOCK | _PRE_POST_NORMS, _gemma, norm_offset=1
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "gemma3_text", _BLOCK | _PRE_POST_NORMS, _gemma, norm_offset=1
    ),
}


def architecture_of(file: GGUFFile) -> Architecture:
    """Returns how a file's architecture stands in Hugging Face's.

    Raises:
        UserError: it is not known.
    """
    if file.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"architecture {file.architecture} is not supported; use one of {known}")
    if file.architecture == "llama" and file.get("expert_count", 0):
        return _MIXTRAL
    return ARCHITECTURES[file.architecture]


def configs(file: GGUFFile, architecture: Architecture, dtype: Dtype) -> dict[str, str]:
    """Returns the texts of config.json and generation_config.json."""
    heads, kv_heads = file.heads
    if file.get("rope.dimension_count", file.head_dim) != file.head_dim:
        raise UserError("only a part of each head rotates, which is not supported")
    tokens = {
        f"{name}_token_id": file.facts.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    tokens = {key: token for key, token in tokens.items() if token is not None}
    config = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": file.shapes["token_embd.weight"][0],
        "hidden_size": file.get("embedding_length"),
        "intermediate_size": file.get("feed_forward_length"),
        "num_hidden_layers": file.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": file.head_dim,
        "max_position_embeddings": file.get("context_length"),
        "rms_norm_eps": file.get("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.get("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(file),
        "tie_word_embeddings": "output.weight" not in file.shapes,
        **architecture.config(file),
        **tokens,
        "torch_dtype": dtype,
    }
    if ends := _ends(file.facts):
        tokens["eos_token_id"] = ends
    texts = {"config.json": config, "generation_config.json": tokens}
    return {name: json.dumps(values, indent=2) + "\n" for name, values in texts.items()}


def _ends(facts: Mapping[str, Any]) -> list[int]:
    """Returns the tokens that end an answer."""
    keys = (f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom"))
    ids = [facts[key] for key in keys if key in facts]
    # Older files do not say which token ends a turn; the template writes it.
    template, tokens = facts.get("tokenizer.chat_template", ""), facts["tokenizer.ggml.tokens"]
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
    turns = [tokens.index(name) for name in names if name in template and name in tokens]
    return list(dict.fromkeys([*ids, *turns]))


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    """Returns config.json's rope_scaling."""
    if LEFT_OUT in file.shapes:
        return _llama3_scaling(file)
    kind = file.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"RoPE scaling {kind} is not supported; use one of linear, yarn, llama3")
    scaling = {"rope_type": kind, "factor": file.get("rope.scaling.factor")}
    if kind == "yarn":
        length = file.get("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = length
    return scaling


def _llama3_scaling(file: GGUFFile) -> dict[str, Any]:
    """Returns the scaling that divides frequencies by the numbers in the file.

    Every published model has the same bounds and length; that they give these numbers is checked.

    Source: `_compute_llama3_parameters` in transformers 5.24.
    """
    divisors = file.weights(LEFT_OUT)
    factor, low, high, length = float(divisors.max()), 1.0, 4.0, 8192
    width = 2 * len(divisors)
    wavelengths = 2 * np.pi * file.get("rope.freq_base") ** (np.arange(0, width, 2) / width)
    # 0 where a wave is too long for the length that was trained, 1 where it fits often enough.
    kept = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(1 / divisors, (1 - kept) / factor + kept, rtol=1e-4, atol=0):
        raise UserError(f"{LEFT_OUT} is not the RoPE scaling of Llama 3, and no other is known")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
