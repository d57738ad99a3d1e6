"""Families: their tables and options give what transformers computed; config.json both ways."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from small_folders import write_folder
from tiny_families import CASES, NUM_NEW, PROMPT_LEN, computed, config_json, decoder_of, tensors_of

from jaxgen.errors import UserError
from jaxgen.formats.families import FAMILIES, family_for, family_of
from jaxgen.models import presets
from jaxgen.nn.rope import RopeScaling

GOLDEN = Path(__file__).parent.parent / "golden" / "families"


@pytest.mark.parametrize("case", CASES)
def test_a_tiny_model_computes_what_transformers_did(case, tmp_path):
    """Values of transformers 5.24: python tests/formats/test_families_parity.py writes them anew.

    Its greedy text is the first row: each of our logits is largest at the next token.
    """
    golden = json.loads((GOLDEN / f"{case}.json").read_text())
    given = config_json(case)
    family = family_of(given)
    write_folder(tmp_path, given, tensors_of(family, family.read(given)))
    logits, loss, gradients = computed(decoder_of(tmp_path), golden["greedy"])
    for position, values in golden["logits"].items():
        np.testing.assert_allclose(logits[1, int(position), : len(values)], values, atol=1e-4)
    text = logits[0, PROMPT_LEN - 1 :][:NUM_NEW].argmax(axis=-1)
    assert text.tolist() == golden["greedy"]
    assert loss == pytest.approx(golden["loss"], rel=1e-5)
    norms = {name: float(np.linalg.norm(gradient)) for name, gradient in gradients.items()}
    assert norms == pytest.approx(golden["gradients"], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_config_is_written_as_it_is_read(case):
    given = config_json(case)
    config = family_of(given).read(given)
    for family in (family_of(given), family_for(config)[0]):
        assert family.read(family.write(config)) == config


def test_every_family_has_a_tiny_model():
    assert {family_of(config_json(case)).architecture for case in CASES} == {
        family.architecture for family in FAMILIES
    }


@pytest.mark.parametrize("name", [name for name in vars(presets) if name.isupper()])
def test_a_preset_is_written_for_the_family_of_its_name(name):
    config = getattr(presets, name)
    family, written = family_for(config)
    kind = family.model_type.removesuffix("_text").replace("_moe", "")
    # Without its fused tensors Phi-3 is a Mistral, and that without its window a Llama.
    plain = {"phi": "mistral", "mistral": "llama", "smollm2": "llama"}
    stem = name.lower().partition("_")[0]
    assert kind.rstrip("23") == plain.get(stem, stem).rstrip("23")
    assert json.loads(json.dumps(written)) == written
    assert family.read(written) == config


LLAMA = config_json("llama_llama3")


def read(case, **changes):
    given = config_json(case) | changes
    return family_of(given).read(given)


def scaled(**options):
    return read("llama_llama3", rope_scaling=options).rope_scaling


def test_both_styles_of_rope_scaling_are_read():
    """Those of transformers 4, older and newer, and of 5."""
    linear = RopeScaling(kind="linear", factor=2.0)
    assert scaled(type="linear", factor=2) == linear
    assert scaled(rope_type="linear", factor=2.0) == linear
    assert scaled(rope_type="default") is None
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}
    config = read("llama_llama3", rope_scaling=None, rope_theta=1, rope_parameters=new)
    assert (config.rope_theta, config.rope_scaling) == (5e4, linear)


def test_gemma_3_in_both_styles_is_one_model():
    old = config_json("gemma3")
    names = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern")
    new = {key: value for key, value in old.items() if key not in names}
    new["layer_types"] = [*["sliding_attention"] * 2, "full_attention", "sliding_attention"]
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
    family = family_of(old)
    assert family.read(new) == family.read(old)
    assert family.read(old).layer_pattern == ("local", "local", "global")


def test_yarn_infers_what_is_not_said():
    plain = scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    assert scaled(rope_type="yarn", original_max_position_embeddings=32) == plain
    assert scaled(rope_type="yarn", factor=4).original_max_seq_len == 128
    deepseek = scaled(rope_type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.5)
    assert deepseek.attention_factor == pytest.approx(1.3688879454 / 1.1844439727)


def test_layers_after_max_window_layers_are_local():
    config = read("qwen2", max_window_layers=1)
    assert config.local_layers == (False, True, True, True)
    assert read("qwen2", use_sliding_window=False).sliding_window is None
    # Every third layer of four is a pattern too.
    assert read("qwen2", layer_types=["full_attention"] * 4).layer_pattern == ("global",)


def scaling(kind, **options):
    return {"rope_type": kind, **options}


@pytest.mark.parametrize(
    ("case", "changes", "same"),
    [
        ("llama_linear", {"architectures": None}, {}),
        ("llama_linear", {"architectures": []}, {}),
        ("llama_linear", {"tie_word_embeddings": None}, {"tie_word_embeddings": False}),
        ("gemma2", {"query_pre_attn_scalar": 144.0}, {"query_pre_attn_scalar": 144}),
        ("gemma2", {"hidden_activation": None}, {"hidden_activation": "gelu_pytorch_tanh"}),
        ("llama_linear", {"rope_parameters": {"rope_type": "default"}}, {}),
        (
            "llama_linear",
            {"rope_scaling": scaling("yarn", factor=4.0, finetuned=True)},
            {"rope_scaling": scaling("yarn", factor=4.0)},
        ),
    ],
)
def test_what_says_the_same_in_other_words_is_read_in_silence(capsys, case, changes, same):
    assert read(case, **changes) == read(case, **same)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama_linear", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("llama_linear", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("llama_linear", {"hidden_act": "relu"}, "hidden_act='relu' is not supported; use one of"),
        ("llama_linear", {"quantization_config": {}}, "quantization_config={} is not supported"),
        ("mistral", {"layer_types": ["full_attention"]}, "layer_types=['full_attention'] is not"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention' is not supp"),
        ("qwen3", {"layer_types": ["full_attention"]}, "1 layer_types and num_hidden_layers=4"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=[1] is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75 is not supported"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope_type='longrope' is not supported; use one of default",
        ),
        (
            "llama_linear",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic' is not supported; use one of default, linear, llama3, yarn",
        ),
        (
            "llama_linear",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate of RoPE scaling yarn=False is not supported",
        ),
        (
            "llama_linear",
            {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 4]}},
            "mrope_section of RoPE scaling default=[4, 4] is not supported",
        ),
        ("llama_linear", {"rope_scaling": {"type": "linear"}}, "scaling linear has no factor"),
        ("llama_linear", {"hidden_size": "32"}, "hidden_size='32' is no int"),
        ("llama_linear", {"num_attention_heads": 0}, "=0 is no int of at least 1"),
        ("llama_linear", {"max_position_embeddings": 10**12}, "=1000000000000 is no int of at"),
        ("llama_linear", {"num_attention_heads": 4.5}, "num_attention_heads=4.5 is no int"),
        ("llama_linear", {"vocab_size": None}, "vocab_size=None is no int"),
        ("llama_linear", {"rms_norm_eps": math.nan}, "rms_norm_eps=nan is no finite number"),
        ("llama_linear", {"rope_theta": 10**400}, "is no finite number"),
        ("llama_linear", {"rope_theta": True}, "rope_theta=True is no float"),
        ("llama_linear", {"rope_theta": 0}, "rope_theta=0.0; use a number above 1"),
        ("llama_linear", {"rope_theta": -5.0}, "rope_theta=-5.0; use a number above 1"),
        ("llama_yarn", {"rope_theta": 1}, "rope_theta=1.0; use a number above 1"),
        ("gemma3", {"rope_local_base_freq": 0}, "rope_local_theta=0.0; use a number above 1"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attention_soft_cap=0.0; use a number above 0"),
        (
            "llama_linear",
            {"rope_scaling": None, "rope_parameters": {"rope_theta": "abc"}},
            "rope_theta='abc' is no float",
        ),
        (
            "llama_linear",
            {"rope_scaling": None, "rope_parameters": {"rope_theta": [1]}},
            "rope_theta=[1] is no float",
        ),
        (
            "gemma3",
            {"rope_scaling": None, "rope_parameters": {"full_attention": 5}},
            "full_attention=5 is no dict",
        ),
        ("llama_linear", {"rope_scaling": scaling("linear", factor=0)}, "factor=0.0; use"),
        ("llama_linear", {"rope_scaling": scaling("linear", factor=-2)}, "factor=-2.0; use"),
        (
            "llama_linear",
            {"rope_scaling": scaling("llama3", factor=8, low_freq_factor=4, high_freq_factor=4)},
            "low_freq_factor=4.0 is not below high_freq_factor=4.0",
        ),
        (
            "llama_linear",
            {"rope_scaling": scaling("yarn", factor=8, beta_slow=0)},
            "beta_slow=0.0; use a number above 0",
        ),
        (
            "qwen2",
            {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 4},
            "config.json: layer_types has sliding_attention and no sliding_window is in use",
        ),
        ("llama_linear", {"architectures": "FooForCausalLM"}, "='FooForCausalLM' is no list"),
        ("llama_linear", {"architectures": {}}, "architectures={} is no list"),
        ("llama_linear", {"architectures": 5}, "architectures=5 is no list"),
        ("llama_linear", {"architectures": None, "model_type": "bert"}, "architecture bert is not"),
        ("llama_linear", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type=['yarn'] is not"),
        ("llama_linear", {"architectures": ["BertModel"]}, "architecture BertModel is not supp"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_by_name(case, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(case, **changes)


def test_a_config_without_a_size_is_refused():
    given = config_json("llama_linear")
    del given["hidden_size"]
    with pytest.raises(UserError, match=r"config\.json has no hidden_size"):
        family_of(given).read(given)


def test_unknown_keys_are_named_and_harmless_ones_are_not(capsys):
    read("llama_linear", attention_dropout=0.1, torch_dtype="bfloat16", mlp_bias=None)
    assert capsys.readouterr().err == ""
    read("llama_linear", qk_clip=1.0, alibi=True)
    assert capsys.readouterr().err == "config.json: ignored alibi, qk_clip: not known\n"


def test_what_no_family_has_is_refused():
    config = dataclasses.replace(presets.LLAMA_3_1_8B, norms="post")
    with pytest.raises(UserError, match="no published architecture has all"):
        family_for(config)


def test_a_shape_that_an_architecture_does_not_load_goes_to_the_next():
    config = dataclasses.replace(presets.LLAMA_3_1_8B, embed_dim=4100)
    assert family_for(config)[0].architecture == "MistralForCausalLM"


def test_a_model_is_expressed_whatever_it_does_not_use():
    """A pattern in other words, options of other scalings, and what only training weighs."""
    moe = dataclasses.replace(presets.MIXTRAL_8X7B.moe, z_loss_weight=1e-3)
    scaling = RopeScaling(kind="linear", factor=2.0, beta_fast=3.0)
    config = dataclasses.replace(
        presets.MIXTRAL_8X7B,
        moe=moe,
        rope_scaling=scaling,
        layer_pattern=("global", "global"),
        sliding_window=5,
        attention_scale=128**-0.5,
    )
    assert family_for(config)[0].architecture == "MixtralForCausalLM"
