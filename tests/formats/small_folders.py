"""Small Hugging Face folders for tests, written by plain NumPy: the other way of making them."""

import json
import struct

import jax.numpy as jnp
import numpy as np

from jaxgen.data import sources
from jaxgen.data.tokenizer import Tokenizer

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
# 8 heads and 4 kv heads, so that every mesh of 8 devices divides them.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 272,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 257,
    "bos_token_id": 256,
}


def llama_tensors(given=LLAMA, dtype="float32", seed=0):
    """Random tensors of a Llama, in the shapes of its config."""
    D, F, H = given["hidden_size"], given["intermediate_size"], given["head_dim"]
    N, K, V = given["num_attention_heads"], given["num_key_value_heads"], given["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not given["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(given["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (D,),
            f"{layer}post_attention_layernorm.weight": (D,),
            f"{layer}self_attn.q_proj.weight": (N * H, D),
            f"{layer}self_attn.k_proj.weight": (K * H, D),
            f"{layer}self_attn.v_proj.weight": (K * H, D),
            f"{layer}self_attn.o_proj.weight": (D, N * H),
            f"{layer}mlp.gate_proj.weight": (F, D),
            f"{layer}mlp.up_proj.weight": (F, D),
            f"{layer}mlp.down_proj.weight": (D, F),
        }
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.3, shape).astype(np.float32).astype(jnp.dtype(dtype))
        for name, shape in shapes.items()
    }


def write_file(url, tensors, header=None):
    """A safetensors file, tensors in the order given; `header` changes its entries."""
    entries, start = {}, 0
    for name, values in tensors.items():
        offsets = [start, start + values.nbytes]
        shape = list(values.shape)
        entries[name] = {"dtype": CODES[values.dtype.name], "shape": shape, "data_offsets": offsets}
        start += values.nbytes
    text = json.dumps(entries | (header or {})).encode()
    raw = b"".join(values.tobytes() for values in tensors.values())
    sources.write_bytes(str(url), struct.pack("<Q", len(text)) + text + raw)


def write_folder(folder, given=LLAMA, tensors=None, generation=None, shards=1):
    """A folder with config, tokenizer and weights, in one file or several with an index."""
    tensors = llama_tensors(given) if tensors is None else tensors
    sources.write_bytes(f"{folder}/config.json", json.dumps(given).encode())
    if generation is not None:
        sources.write_bytes(f"{folder}/generation_config.json", json.dumps(generation).encode())
    Tokenizer.from_bytes().save(str(folder))
    if shards == 1:
        write_file(f"{folder}/model.safetensors", tensors)
        return
    places, names = {}, list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        write_file(f"{folder}/{file}", part)
        places |= dict.fromkeys(part, file)
    index = json.dumps({"metadata": {"total_size": 0}, "weight_map": places})
    sources.write_bytes(f"{folder}/model.safetensors.index.json", index.encode())
