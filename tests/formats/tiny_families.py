"""A tiny model of every family with all that sets it apart, of random numbers named by its tensors.

Windows are shorter than the rows, scaled rotations go past the trained length, caps bend most
scores, norms are not one and biases not zero: what is not applied, or wrongly, shows.
"""

import functools
import math
import zlib

import jax
import numpy as np

from jaxgen.checkpoint.tree import named_leaves
from jaxgen.formats.families import family_of
from jaxgen.models.config import ComputeConfig
from jaxgen.models.decoder import Decoder
from jaxgen.sharding import MeshConfig, abstract, make_mesh

PROMPT_LEN, NUM_NEW = 8, 64
# Half of the compile time.
FAST = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
TRAINED = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
CASES = {
    "llama_linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_llama3": {"rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "llama_yarn": {"rope_scaling": {"rope_type": "yarn", "beta_fast": 4, **TRAINED}},
    "smollm2": {"is_llama_config": True, "rope_interleaved": False, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
        "rope_parameters": {"rope_theta": 50.0, "rope_type": "yarn", "truncate": True, **TRAINED},
    },
    "qwen3_moe": {
        "num_experts": 6,
        "norm_topk_prob": False,
        "moe_intermediate_size": 24,
        "use_sliding_window": True,
        "sliding_window": 8,
        **EXPERTS,
    },
    "mixtral": {"num_local_experts": 4, "sliding_window": 8, **EXPERTS},
    "gemma2": {
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 10.0,
        "sliding_window": 8,
    },
    "gemma3": {
        "query_pre_attn_scalar": 9,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "rope_local_base_freq": 20.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "olmo2": {"rope_scaling": LLAMA3},
    "phi3": {"sliding_window": 8},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "smollm2": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


def config_json(case):
    architecture = ARCHITECTURES.get(case) or ARCHITECTURES[case.partition("_")[0]]
    given = {"architectures": [architecture], **SIZES, **CASES[case]}
    return {"model_type": family_of(given).model_type, **given}


def rows(greedy):
    """Two rows of tokens: a prompt with what follows it, and random ones."""
    tokens = np.random.default_rng(1).integers(0, 128, (2, PROMPT_LEN + NUM_NEW), np.int32)
    tokens[0, PROMPT_LEN:] = greedy
    return tokens


def places(family, model):
    """For every parameter its name, leaf, and parts of its shape, and the rows before it."""
    leaves, table = dict(named_leaves(model)), {tensor.ours: tensor for tensor in family.tensors}

    def outputs(name):
        stacked = table[name].theirs.count("{")
        return leaves[name].shape[stacked + table[name].inputs :]

    for name, leaf in leaves.items():
        tensor = table[name]
        stacked = tensor.theirs.count("{")
        inputs = leaf.shape[stacked : stacked + tensor.inputs]
        before = sum(math.prod(outputs(other)) for other in tensor.after)
        yield name, leaf, tensor, leaf.shape[:stacked], inputs, outputs(name), before


def abstract_decoder(config):
    compute = ComputeConfig(dtype="float32")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return abstract(lambda: Decoder(config, key=jax.random.key(0), compute=compute), mesh)


def tensors_of(family, config):
    """Their tensors by name: random numbers, drawn for each by its name."""
    shapes = {}
    for _, _, tensor, stack, inputs, outputs, before in places(family, abstract_decoder(config)):
        for index in np.ndindex(stack):
            theirs = tensor.theirs.format(**dict(zip(("layer", "expert"), index, strict=False)))
            if inputs:
                size = before + math.prod(outputs)
                size = max(size, shapes.get(theirs, (0,))[0])
                shapes[theirs] = (size, math.prod(inputs))
            else:
                shapes[theirs] = (math.prod(outputs),) if stack else outputs
    drawn = {}
    for name, shape in sorted(shapes.items()):
        values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if name.endswith("norm.weight"):
            values = 0.3 * values + (0.0 if config.norm_plus_one else 1.0)
        elif len(shape) == 2 and "embed_tokens" not in name:
            values *= (3.0 if "lm_head" in name or ".gate.w" in name else 1.5) / math.sqrt(shape[1])
        drawn[name] = values.astype(np.float32)
    return drawn


def from_theirs(family, model, tensors):
    """Arrays by our names, from tensors by theirs."""
    found = {}
    for name, leaf, tensor, stack, inputs, outputs, before in places(family, model):
        value = np.empty(leaf.shape, np.float32)
        for index in np.ndindex(stack):
            theirs = tensors[
                tensor.theirs.format(**dict(zip(("layer", "expert"), index, strict=False)))
            ]
            part = theirs[before : before + math.prod(outputs)] if inputs else theirs
            part = part.reshape(*outputs, *inputs)
            order = (*range(len(outputs), part.ndim), *range(len(outputs)))
            value[index] = part.transpose(order)
        found[name] = value
    return found


def decoder_of(case):
    """The model of a case on the current mesh, through its config.json and the table."""
    given = config_json(case)
    family = family_of(given)
    config = family.read(given)
    model = abstract_decoder(config)
    values = from_theirs(family, model, tensors_of(family, config))
    leaves, tree = jax.tree.flatten(model)
    placed = [
        jax.device_put(value, leaf.sharding)
        for value, leaf in zip(values.values(), leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, placed)


def computed(case, greedy):
    """Logits, mean loss, and its gradients by our names, of `rows(greedy)`."""
    tokens = rows(greedy)
    targets = np.roll(tokens, -1, axis=1)
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    segments = np.ones_like(tokens)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def objective(model, tokens, targets, positions, segments, weights):
        spans = (positions, segments)
        loss = model.loss_sums(tokens, targets, *spans, weights)[0]
        return loss / weights.sum(), model(tokens, *spans)

    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        batch = (tokens, targets, positions, segments, weights)
        (loss, logits), gradients = FAST(objective)(decoder_of(case), *batch)
    return np.asarray(logits), float(loss), dict(named_leaves(gradients))
