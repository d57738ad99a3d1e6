import contextlib
import io
import json

import gguf
import gguf_files as files
import jax
import numpy as np
import pytest

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.formats import safetensors
from jaxgen.formats.gguf import convert
from jaxgen.formats.gguf_file import GGUFFile
from jaxgen.pretrained import load_model, open_model
from jaxgen.sharding import MeshConfig, make_mesh

QUANTISED = {"attn_q": files.Q4_0, "attn_k": files.Q8_0, "ffn_down": files.Q4_0}


def read(folder):
    """Every tensor of a folder as fp32."""
    return {
        name: stored.read(0, int(np.prod(stored.shape))).reshape(stored.shape).astype(np.float32)
        for name, stored in safetensors.open_folder(str(folder)).items()
    }


def dequantised(weights, kind):
    return gguf.dequantize(gguf.quants.quantize(weights, kind), kind)


@contextlib.contextmanager
def silence():
    """Checks that nothing is said on standard error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        yield
    assert said.getvalue() == ""


def converted(tmp_path, arch, *, facts=None, **options):
    """Writes and converts a model; returns its true weights, those read, and its config.json."""
    true = files.weights(arch, **options)
    files.write(tmp_path / "m.gguf", arch, files.theirs(arch, true), facts=facts)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    # Every key is known and every tensor has its place: the folder is a model.
    with silence():
        pretrained = open_model(tmp_path / "out")
    load_model(pretrained, pretrained.serve_config(), make_mesh(MeshConfig(), jax.devices()[:1]))
    return true, read(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.smoke
def test_a_llama_is_what_it_was_before(tmp_path):
    true = files.weights("llama")
    path, out = tmp_path / "m.gguf", tmp_path / "out"
    files.write(path, "llama", files.theirs("llama", true), quantised=QUANTISED)
    said = convert(path, out)
    kinds = {"q_proj": files.Q4_0, "k_proj": files.Q8_0, "down_proj": files.Q4_0}
    found = read(out)
    assert found.keys() == true.keys()
    for name, weights in true.items():
        # Blocks of 32 lie within a row, so rows may change places before or after.
        expected = dequantised(weights, kinds.get(name.split(".")[-2], files.F32))
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    count = sum(weights.size for weights in true.values())
    assert said == f"wrote {out}: LlamaForCausalLM, {count:,} weights in float32"
    config = json.loads((out / "config.json").read_text())
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    generation = json.loads((out / "generation_config.json").read_text())
    # The file names the end of text; the template ends a turn with another token.
    assert generation == {"bos_token_id": 1, "eos_token_id": [0, 2]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]


def test_qwen_has_biases_and_a_head_and_rows_in_order(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
    facts = {f"qwen2.rope.scaling.{key}": value for key, value in yarn.items()}
    true, found, config = converted(tmp_path, "qwen2", facts=facts, bias=True, head=True)
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    assert not config["tie_word_embeddings"]
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert found.keys() == true.keys()
    for name, weights in true.items():
        np.testing.assert_array_equal(found[name], weights, err_msg=name)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_norms_of_gemma_are_stored_one_higher(tmp_path, arch):
    facts = {f"{arch}.attention.sliding_window": 16}
    if arch == "gemma2":
        facts |= {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0}
    else:
        facts |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    true, found, config = converted(tmp_path, arch, facts=facts, qk_norm=arch == "gemma3")
    assert found.keys() == true.keys()
    for name, weights in true.items():
        # 1 + w rounds w to 2**-24.
        atol = 2**-24 if "norm" in name else 0
        np.testing.assert_allclose(found[name], weights, rtol=0, atol=atol, err_msg=name)
    assert (config["sliding_window"], config["query_pre_attn_scalar"]) == (16, 32)
    assert config["attn_logit_softcapping"] == (50 if arch == "gemma2" else None)
    assert config["hidden_activation"] == "gelu_pytorch_tanh"
    if arch == "gemma3":
        assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
        assert config["rope_local_base_freq"] == 10_000


def test_experts_come_apart(tmp_path):
    facts = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 96}
    facts = {f"qwen3moe.{key}": value for key, value in facts.items()}
    true, found, config = converted(tmp_path, "qwen3moe", facts=facts, qk_norm=True, experts=3)
    assert found.keys() == true.keys()
    for name, weights in true.items():
        np.testing.assert_array_equal(found[name], weights, err_msg=name)
    assert (config["num_experts"], config["moe_intermediate_size"]) == (3, 96)


def test_a_llama_with_experts_is_a_mixtral(tmp_path):
    facts = {"llama.expert_count": 2, "llama.expert_used_count": 1}
    true, found, config = converted(tmp_path, "llama", facts=facts, experts=2)
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 1)
    for name, weights in true.items():
        name = name.replace(".mlp.", ".block_sparse_moe.")
        for ours, mixtral in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            name = name.replace(ours, mixtral)
        np.testing.assert_array_equal(found[name], weights, err_msg=name)


def llama3_divisors(factor, low=1.0, high=4.0, length=8192):
    """As the converter computes them, one after the other."""
    divisors = []
    for n in range(0, 32, 2):
        wavelength = 2 * np.pi * 1e5 ** (n / 32)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(divisors, np.float32)


def test_frequencies_of_llama_3_are_its_scaling(tmp_path):
    tensors = files.theirs("llama", files.weights("llama"))
    tensors["rope_freqs.weight"] = llama3_divisors(8.0)
    assert 1 < tensors["rope_freqs.weight"][9] < 8
    files.write(tmp_path / "m.gguf", "llama", tensors)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in read(tmp_path / "out")
    tensors["rope_freqs.weight"] = llama3_divisors(8.0, high=3.0)
    files.write(tmp_path / "m.gguf", "llama", tensors)
    with pytest.raises(UserError, match="is not the RoPE scaling of Llama 3"):
        convert(tmp_path / "m.gguf", tmp_path / "other")


def test_other_dtypes_and_several_files(tmp_path, monkeypatch):
    true = files.weights("llama")
    files.write(tmp_path / "m.gguf", "llama", files.theirs("llama", true))
    monkeypatch.setattr(safetensors, "MAX_FILE_BYTES", 60_000)
    convert(tmp_path / "m.gguf", tmp_path / "out", "bfloat16")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    found = read(tmp_path / "out")
    for name, weights in true.items():
        np.testing.assert_allclose(found[name], weights, rtol=2**-8, atol=0, err_msg=name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_tokenizer_and_its_template_come_along(tmp_path):
    files.write(tmp_path / "m.gguf", "llama", files.theirs("llama", files.weights("llama")))
    convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.load(str(tmp_path / "out"))
    text = "the 2024 été 漢字 😀\n\tend"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat_template == files.TEMPLATE
    assert (tokenizer.begin, tokenizer.eos_id, tokenizer.vocab_size) == ((), 0, 264)
    assert tokenizer.encode("<|im_end|>", special=True) == [2]


# What the merges "2 0" and "20 2" and the word " the" become of a text, by the rule that cuts it.
@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["2", "0", "2", "4", "Ġthe"]),
        ("qwen2", ["2", "0", "2", "4", "Ġthe"]),
        ("llama-bpe", ["202", "4", "Ġthe"]),
        ("gpt-2", ["202", "4", "Ġthe"]),
        ("tekken", ["2", "0", "2", "4", "Ġthe"]),
        ("gpt-4o", ["202", "4", "Ġthe"]),
        ("default", ["202", "4", "Ġthe"]),
    ],
)
def test_numbers_are_cut_as_the_file_says(tmp_path, pre, pieces):
    tensors = files.theirs("llama", files.weights("llama"))
    files.write(tmp_path / "m.gguf", "llama", tensors, pre=pre)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    vocab = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    tokenizer = Tokenizer.load(str(tmp_path / "out"))
    assert tokenizer.encode("2024 the") == [vocab[piece] for piece in pieces]


def test_pieces_are_merged_by_their_scores(tmp_path):
    path = tmp_path / "m.gguf"
    files.write(path, "llama", {}, tokenizer=False)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    scores = [0.0] * len(tokens)
    for score, piece in enumerate(["▁", "a", "b", "c", "ab", "bc", "▁abc", "abc"]):
        tokens.append(piece)
        types.append(1)
        # "bc" is likelier than "ab", so "abc" becomes a + bc.
        scores.append({"ab": -9.0, "bc": -1.0}.get(piece, -float(score)))
    facts = {"tokens": tokens, "token_type": types, "scores": scores, "model": "llama"}
    facts |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    from jaxgen.formats.gguf_tokenizer import tokenizer_files

    for prefix in (True, False):
        texts = tokenizer_files(
            {f"tokenizer.ggml.{k}": v for k, v in (facts | {"add_space_prefix": prefix}).items()}
        )
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        tokenizer = Tokenizer.load(str(tmp_path))
        # llama.cpp's default for this kind.
        assert tokenizer.begin == (1,)
        first = ["▁abc"] if prefix else ["abc"]
        ids = [tokens.index(piece) for piece in [*first, "▁", "a", "<0xC3>", "<0xA9>"]]
        if prefix:
            assert tokenizer.encode("abc aé") == ids
        else:
            assert tokenizer.encode("abc aé") == ids
        assert tokenizer.decode(tokenizer.encode("abc aé")) == "abc aé"
        assert tokenizer.encode("ab") == [
            tokens.index(piece) for piece in (["▁", "ab"] if prefix else ["ab"])
        ]


def test_what_cannot_be_converted_leaves_nothing(tmp_path):
    tensors = files.theirs("llama", files.weights("llama"))
    path, out = tmp_path / "m.gguf", tmp_path / "out"

    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            convert(path, out)
        assert "\n" not in str(error.value)
        assert not out.exists()
        assert not list(tmp_path.glob("*.partial"))

    refused("does not exist")
    with pytest.raises(UserError, match="is a URL; GGUF files are read in place"):
        convert("gs://bucket/m.gguf", out)
    path.write_bytes(b"GG")
    refused("is not a GGUF file, or is cut short")
    path.write_text("a text that is long enough to be read as a header" * 9)
    refused("is not a GGUF file")
    files.write(path, "llama", tensors)
    whole = path.read_bytes()
    for size in (24, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("is not a GGUF file, or is cut short")
    files.write(path, "mamba", tensors)
    refused("architecture mamba is not supported; use one of llama, qwen2")
    files.write(path, "llama", tensors, pre="brand-new")
    refused("tokenizer.ggml.pre=brand-new is not supported.*gpt-2.*smollm")
    files.write(path, "llama", tensors, tokenizer=False)
    refused("tokenizer.ggml.tokens")
    files.write(path, "llama", tensors | {"blk.0.ssm_a.weight": np.ones(3, np.float32)})
    refused("tensor blk.0.ssm_a.weight has no place in a LlamaForCausalLM")
    files.write(path, "llama", tensors, facts={"llama.rope.scaling.type": "longrope"})
    refused("RoPE scaling longrope is not supported; use one of linear, yarn, llama3")
    yarn = {"type": "yarn", "factor": 4.0, "attn_factor": 0.5}
    yarn = {f"llama.rope.scaling.{key}": value for key, value in yarn.items()}
    files.write(path, "llama", tensors, facts=yarn)
    refused("attn_factor of RoPE scaling yarn is not supported")
    files.write(path, "llama", tensors, facts={"split.count": 3})
    refused("is one of 3 files of a model; join them")
    files.write(path, "gemma2", files.theirs("gemma2", files.weights("gemma2")))
    refused("says no gemma2.attention.sliding_window")
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        convert(path, out)
    assert (out / "mine").exists()


BIAS = {"blk.0.attn_q.bias": np.zeros(128, np.float32)}


@pytest.mark.parametrize(
    ("more", "options", "line"),
    [
        ({}, {"bos": 999}, "its header contradicts itself .*IndexError"),
        ({}, {"num_types": 5}, "its header contradicts itself .*ValueError"),
        ({}, {"sizes": {"heads": [4, 4]}}, r"heads=\[4, 4\] kv_heads=2 are not supported"),
        ({}, {"sizes": {"heads": 0}}, "heads=0 kv_heads=2 are not supported"),
        ({}, {"sizes": {"kv_heads": [2, 2]}}, r"heads=4 kv_heads=\[2, 2\] are not supp"),
        (BIAS, {}, r"tensor model\.layers\.0\.self_attn\.q_proj\.bias \[128\] in it has no place"),
        (
            {},
            {"sizes": {"layers": 3}},
            r"it has no tensor model\.layers\.2\..* by its config",
        ),
        (
            {},
            {"sizes": {"mlp": 95}},
            r"down_proj\.weight is \[64, 96\] in it and \[64, 95\] by its",
        ),
        ({}, {"sizes": {"kv_heads": 4}}, r"k_proj\.weight is \[64, 64\] in it and \[128, 64\]"),
        ({}, {"merges": ["q never"]}, "is not a tokenizer .*out of vocabulary"),
        (
            {},
            {"facts": {"llama.embedding_scale": 12.0}},
            r"llama\.embedding_scale=12\.0 is not supp",
        ),
        ({}, {"facts": {"llama.residual_scale": 0.22}}, r"llama\.residual_scale=0\.22 is not supp"),
        ({}, {"facts": {"llama.logit_scale": 8.0}}, r"llama\.logit_scale=8\.0 is not supported"),
    ],
)
def test_a_header_that_contradicts_its_tensors_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, more, options, line
):
    path, tensors = tmp_path / "m.gguf", files.theirs("llama", files.weights("llama"))
    files.write(path, "llama", tensors | more, **options)
    monkeypatch.setattr(GGUFFile, "weights", lambda *args: pytest.fail("it was read"))
    with pytest.raises(UserError, match=rf"m\.gguf: .*{line}") as error:
        convert(path, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_what_no_one_reads_is_named(tmp_path, capsys):
    path, tensors = tmp_path / "m.gguf", files.theirs("llama", files.weights("llama"))
    facts = {"llama.attention.sliding_window": 16, "llama.logit_scale": 1.0, "llama.vocab_size": 9}
    files.write(path, "llama", tensors, facts=facts)
    convert(path, tmp_path / "out")
    said = f"{path}: ignored llama.attention.sliding_window: not known\n"
    assert capsys.readouterr().err == said


def test_what_float16_cannot_hold_is_not_written(tmp_path):
    path, tensors = tmp_path / "m.gguf", files.theirs("llama", files.weights("llama"))
    tensors["token_embd.weight"] *= 1e6
    files.write(path, "llama", tensors)
    with pytest.raises(UserError, match=r"embed_tokens\.weight has values that float16 has not"):
        convert(path, tmp_path / "out", "float16")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
