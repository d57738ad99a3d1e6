"""Small GGUF files, written as llama.cpp's converter writes those of published models."""

import re

import gguf
import numpy as np

F32, Q8_0, Q4_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_0"))
SIZES = {"layers": 2, "embed": 64, "mlp": 96, "heads": 4, "kv_heads": 2, "head_dim": 32}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
# Byte-level characters of the 256 bytes, as GPT-2 orders them.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = [*map(chr, PRINTABLE), *(chr(256 + n) for n in range(len(OTHERS)))]
MERGES = ["2 0", "20 2", "Ġ t", "h e", "Ġt he"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def weights(arch, *, qk_norm=False, bias=False, experts=0, head=False):
    """Random tensors by Hugging Face's names, for which GGUF has `names`."""
    s, rng = SIZES, np.random.default_rng(0)
    q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    vocab = len(BYTES) + len(MERGES) + len(SPECIAL)
    shapes = {"model.embed_tokens.weight": (vocab, s["embed"]), "model.norm.weight": (s["embed"],)}
    if head:
        shapes["lm_head.weight"] = (vocab, s["embed"])
    for layer in range(s["layers"]):
        own = {
            "self_attn.q_proj.weight": (q, s["embed"]),
            "self_attn.k_proj.weight": (kv, s["embed"]),
            "self_attn.v_proj.weight": (kv, s["embed"]),
            "self_attn.o_proj.weight": (s["embed"], q),
            "input_layernorm.weight": (s["embed"],),
            "post_attention_layernorm.weight": (s["embed"],),
        }
        if arch.startswith("gemma"):
            own["pre_feedforward_layernorm.weight"] = (s["embed"],)
            own["post_feedforward_layernorm.weight"] = (s["embed"],)
        if bias:
            own |= {f"self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
        if qk_norm:
            own |= {f"self_attn.{x}_norm.weight": (s["head_dim"],) for x in "qk"}
        if experts:
            own["mlp.gate.weight"] = (experts, s["embed"])
        for name in [f"mlp.experts.{e}" for e in range(experts)] or ["mlp"]:
            own |= {f"{name}.{x}_proj.weight": (s["mlp"], s["embed"]) for x in ("gate", "up")}
            own[f"{name}.down_proj.weight"] = (s["embed"], s["mlp"])
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return {name: rng.normal(size=shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}


def write(
    path,
    arch,
    tensors,
    *,
    quantised=None,
    facts=None,
    pre="smollm",
    tokenizer=True,
    sizes=None,
    merges=MERGES,
    num_types=None,
    bos=1,
):
    """Writes a file; `tensors` have GGUF's names, `quantised` their types (F32 if not said)."""
    writer, s = gguf.GGUFWriter(path, arch), SIZES | (sizes or {})
    writer.add_block_count(s["layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(s["embed"])
    writer.add_feed_forward_length(s["mlp"])
    writer.add_head_count(s["heads"])  # A list is a number for each layer.
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_key_length(s["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    for key, value in (facts or {}).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add = writer.add_string if isinstance(value, str) else add
        add(key, value)
    if tokenizer:
        tokens = [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
        writer.add_token_types(types[:num_types])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(bos)
        writer.add_eos_token_id(0)
        writer.add_add_bos_token(False)
        writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors.items():
        kind = (quantised or {}).get(name.split(".")[-2], F32)
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def theirs(arch, tensors):
    """The tensors as GGUF has them: names of the package's own table, rows and norms changed."""
    model_arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(model_arch, SIZES["layers"])
    stored, stacks = {}, {}
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        if arch == "llama" and part in ("q_proj", "k_proj"):
            heads = SIZES["heads" if part == "q_proj" else "kv_heads"]
            halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if arch.startswith("gemma") and part.endswith("norm"):
            tensor = tensor + 1
        if ".experts." in name:
            whole = re.sub(r"experts\.\d+", "experts", name)
            stacks.setdefault(whole, []).append(tensor)
        else:
            stored[table.get_name(name, (".weight", ".bias"))] = tensor
    for name, parts in stacks.items():
        stored[table.get_name(name, (".weight",))] = np.stack(parts)
    return stored
