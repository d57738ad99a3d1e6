"""A run of adapters from a Hugging Face folder, and back to one: merged, and as peft's own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import LLAMA, ONE, run_config

from jaxgen import cli, fields
from jaxgen.config import read_config
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.formats import safetensors
from jaxgen.formats.families import FAMILIES, family_for
from jaxgen.formats.folder import write_folder
from jaxgen.formats.peft import write_adapter
from jaxgen.models.config import ComputeConfig
from jaxgen.nn.lora import Adapters, LoRAConfig
from jaxgen.pretrained import open_model
from jaxgen.sharding import MeshConfig, Rules, make_mesh
from jaxgen.train.loop import LoopConfig
from jaxgen.train.optimizer import OptimizerConfig
from jaxgen.train.program import make_state, read_decoder, stored_state

CONFIG_FILE = """
from jaxgen import TrainConfig
from jaxgen.fields import from_json
config = from_json(TrainConfig, {data!r})
"""
RANK, ALPHA, TARGETS = 4, 6.0, ("q", "v", "o", "up", "down")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("peft")


@pytest.fixture(scope="module")
def tuned(folder):
    """A run of adapters on a folder's model, by the command line."""
    optimizer = OptimizerConfig(learning_rate=3e-2, warmup_steps=0, weight_decay=0.0)
    loop = LoopConfig(steps=4, batch_size=8, seq_len=32)
    config = run_config(folder, train=loop, optimizer=optimizer)
    random = make_state(config, one_device()).model
    family, given = family_for(config.model)
    tokenizer = Tokenizer.from_bytes()
    write_folder(str(folder / "hf"), family, given, random, dtype="float32", tokenizer=tokenizer)
    # In the file another model, which --init replaces.
    config = dataclasses.replace(config, mesh=MeshConfig(), model=LLAMA)
    (folder / "file.py").write_text(CONFIG_FILE.format(data=fields.to_json(config)))
    with pytest.MonkeyPatch.context() as patch:
        # The command would move the suite's cache of compiled programs.
        patch.setattr("jaxgen.compiler.enable_compilation_cache", lambda: None)
        command = ["train", str(folder / "file.py"), "--run-dir", str(folder / "run")]
        command += ["--init", str(folder / "hf"), "--lora.targets", ",".join(TARGETS)]
        command += ["--lora.rank", str(RANK), "--lora.alpha", str(ALPHA)]
        assert cli.main(command) == 0
    return folder / "run"


def one_device():
    return make_mesh(ONE, jax.devices()[:1])


def tensors_of(folder):
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= safetensors.read_header(str(path))
    return {
        name: tensor.read(0, tensor.nbytes // tensor.dtype.itemsize).reshape(tensor.shape)
        for name, tensor in stored.items()
    }


def convert(run_dir, to, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxgen.compiler.enable_compilation_cache", lambda: None)
        assert cli.main(["convert", "to-hf", str(run_dir), str(to), *options]) == 0
    return tensors_of(to)


@pytest.fixture(scope="module")
def adapter(tuned, folder):
    return convert(tuned, folder / "adapter", "--adapter")


def test_init_takes_the_model_and_the_tokenizer_and_leaves_overrides(tuned, folder):
    config = read_config(tuned)
    assert config.model == open_model(folder / "hf").config
    assert config.data.tokenizer == config.init == str(folder / "hf")
    assert config.lora == LoRAConfig(RANK, ALPHA, TARGETS)


def test_the_merged_folder_is_the_base_and_what_the_adapter_adds(tuned, adapter, folder):
    """In the numbers of the two exports, which are written by two routes."""
    base, merged = tensors_of(folder / "hf"), convert(tuned, folder / "merged")
    assert merged.keys() == base.keys()
    assert len(adapter) == 2 * len(TARGETS) * LLAMA.num_layers
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            a, b = adapter[f"{stem}.lora_A.weight"], adapter[f"{stem}.lora_B.weight"]
            assert (a.shape, b.shape) == ((RANK, weight.shape[1]), (weight.shape[0], RANK))
            added = ALPHA / RANK * b @ a
            assert np.abs(added).max() > 1e-3
            np.testing.assert_allclose(merged[name], weight + added, atol=1e-6)
        else:
            np.testing.assert_array_equal(merged[name], weight)
    for name in ("tokenizer.json", "config.json"):
        assert (folder / "merged" / name).exists()
    given = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert given["peft_type"] == "LORA"
    assert (given["r"], given["lora_alpha"]) == (RANK, ALPHA)
    assert given["target_modules"] == ["down_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert given["base_model_name_or_path"] == str(folder / "hf")


@pytest.mark.full
def test_a_run_of_adapters_writes_text(tuned, capsys):
    assert cli.main(["generate", str(tuned), "--prompt", "def", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("def")


def test_a_model_without_adapters_has_none_to_write(folder, tuned, capsys):
    command = ["convert", "to-hf", str(folder / "hf"), str(folder / "none"), "--adapter"]
    assert cli.main(command) == 2
    assert "has no adapters; leave --adapter out" in capsys.readouterr().err


def test_a_tensor_of_two_weights_takes_no_adapter_of_one(tmp_path):
    phi = next(family for family in FAMILIES if family.architecture == "Phi3ForCausalLM")
    config, compute = LoRAConfig(targets=("o", "q")), ComputeConfig()
    with jax.set_mesh(one_device()):
        key = jax.random.key(0)
        adapters = Adapters(config, LLAMA, key=key, compute=compute, rules=Rules())
    with pytest.raises(UserError, match=r"Phi3ForCausalLM has q, k, v in one tensor, .* merges"):
        write_adapter(str(tmp_path / "out"), phi, config, adapters, "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_computes_what_the_adapters_do(tuned, adapter, folder):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    mesh, plain = one_device(), dataclasses.replace(read_config(tuned), lora=None, mesh=ONE)
    with jax.set_mesh(mesh):
        merged = open_model(tuned).read(stored_state(plain, mesh).model)
        base = read_decoder(plain, mesh, open_model(folder / "hf"))
        tokens = np.arange(64, dtype=np.int32).reshape(2, 32) * 7 % 257
        where = np.broadcast_to(np.arange(32, dtype=np.int32), (2, 32))
        rows = tuple(map(jnp.asarray, (tokens, where, np.ones_like(tokens))))
        forward = jax.jit(lambda model: model(*rows))
        ours, before = np.asarray(forward(merged)), np.asarray(forward(base))
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        np.testing.assert_allclose(before, theirs(ids).logits.numpy(), atol=1e-4)
        beside = PeftModel.from_pretrained(theirs, folder / "adapter")(ids).logits.numpy()
    print("largest difference", np.abs(ours - beside).max(), "of", np.abs(ours).max())
    np.testing.assert_allclose(ours, beside, atol=1e-4)
    assert np.abs(ours - before).max() > 0.1, "the adapters add nothing that would be seen"
