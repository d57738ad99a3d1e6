"""Folders as transformers writes them: read, and written again byte by byte."""

import json

import jax
import numpy as np
import pytest

from jaxgen.cli import main
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.formats import safetensors
from jaxgen.formats.families import family_for
from jaxgen.formats.folder import write_folder
from jaxgen.models.config import ComputeConfig, DecoderConfig
from jaxgen.models.decoder import Decoder
from jaxgen.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.parity
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch):
    # The command would move the suite's cache of compiled programs.
    monkeypatch.setattr("jaxgen.compiler.enable_compilation_cache", lambda: None)


def save(folder, dtype="float32", tied=False, **options):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, **options)
    Tokenizer.from_bytes().save(str(folder))
    return model


def state_of(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.state_dict()


def assert_same(theirs, ours):
    assert theirs.keys() == ours.keys()
    for name, values in theirs.items():
        assert values.dtype == ours[name].dtype
        assert values.equal(ours[name]), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_comes_back_byte_by_byte(tmp_path, dtype, tied):
    save(tmp_path / "in", dtype, tied)
    argv = ["convert", "to-hf", str(tmp_path / "in"), str(tmp_path / "out"), "--mesh.tensor", "2"]
    assert main(argv) == 0
    files = sorted(path.name for path in (tmp_path / "in").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert safetensors.WEIGHTS in files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), name
    assert_same(state_of(tmp_path / "in"), state_of(tmp_path / "out"))


def test_sharded_files_are_read_and_written(tmp_path, monkeypatch):
    model = save(tmp_path / "in", "bfloat16", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 3
    monkeypatch.setattr("jaxgen.formats.safetensors.MAX_FILE_BYTES", 15_000)
    assert main(["convert", "to-hf", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 4
    assert_same(model.state_dict(), state_of(tmp_path / "out"))
    totals = []
    for name in ("in", "out"):
        index = json.loads((tmp_path / name / safetensors.INDEX).read_text())
        totals.append(index["metadata"]["total_size"])
    assert totals[0] == totals[1]


def test_the_library_reads_what_we_write_for_another_dtype(tmp_path):
    import torch

    model = save(tmp_path / "in")
    argv = ["convert", "to-hf", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", "float16"]
    assert main(argv) == 0
    half = {name: values.to(torch.float16) for name, values in model.state_dict().items()}
    assert_same(half, state_of(tmp_path / "out"))


def test_transformers_computes_what_a_model_of_ours_does(tmp_path):
    """A model that was never theirs: its config.json is ours to make."""
    import torch
    import transformers

    config = DecoderConfig(
        vocab_size=264,
        num_layers=2,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=48,
        max_seq_len=64,
        rope_theta=500.0,
        tie_embeddings=True,
    )
    compute = ComputeConfig(dtype="float32")
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24), np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
        model = jax.jit(lambda: Decoder(config, key=jax.random.key(0), compute=compute))()
        spec = model.rules.here()("batch", "seq")
        batch = [jax.device_put(x, spec) for x in (tokens, positions, np.ones_like(tokens))]
        ours = jax.jit(lambda model, batch: model(*batch))(model, batch)
    family, given = family_for(config)
    tokenizer = Tokenizer.from_bytes()
    write_folder(str(tmp_path), family, given, model, dtype="float32", tokenizer=tokenizer)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.eos_token_id == tokenizer.eos_id
    with torch.no_grad():
        theirs = loaded(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-4, atol=1e-5)
    text = "def main(): # Grüße"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)
    assert ids["input_ids"] == tokenizer.encode(text)
