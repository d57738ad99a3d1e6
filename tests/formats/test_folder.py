"""Hugging Face folders: the same weights on every mesh, and the same files back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from small_folders import LLAMA, llama_tensors, write_file, write_folder

from jaxgen.checkpoint.tree import named_leaves
from jaxgen.config import ServeConfig
from jaxgen.errors import UserError
from jaxgen.formats import folder as module
from jaxgen.formats import safetensors
from jaxgen.formats.families import DENSE, Family, Tensor, family_of
from jaxgen.formats.folder import read_weights, write_weights
from jaxgen.nn.router import MoEConfig
from jaxgen.pretrained import abstract_model, open_model
from jaxgen.sharding import MeshConfig, make_mesh

ONE = MeshConfig()
MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "pipeline": MeshConfig(pipeline=2, fsdp=2, tensor=2),
    "context": MeshConfig(fsdp=2, context=2, tensor=2),
}
EXPERTS = {"experts": MeshConfig(fsdp=2, expert=4), "three": MeshConfig(fsdp=2, expert=2, tensor=2)}
MOE = "model.layers.{layer}.block_sparse_moe."
EXPERT = MOE + "experts.{expert}."
# A Mixtral, and as a second way of writing it q, k and v in one tensor and gate and up in another.
MIXTRAL = (
    *(tensor for tensor in DENSE if "/mlp/" not in tensor.ours),
    Tensor("layers/mlp/router", MOE + "gate.weight", inputs=1),
    Tensor("layers/mlp/gate", EXPERT + "w1.weight", inputs=1),
    Tensor("layers/mlp/up", EXPERT + "w3.weight", inputs=1),
    Tensor("layers/mlp/down", EXPERT + "w2.weight", inputs=1),
)


def mesh_of(config):
    return make_mesh(config, jax.devices()[: 1 if config == ONE else 8])


def config_of(given=LLAMA, **changes):
    config = family_of(given).read(given)
    return ServeConfig(dataclasses.replace(config, **changes))


def read(folder, config, mesh=ONE, dtype="float32", family=None):
    model = abstract_model(config, mesh_of(mesh), dtype)
    stored = safetensors.open_folder(str(folder))
    return read_weights(str(folder), stored, family or family_of(LLAMA), model)


def assert_equal(model, other):
    for (name, ours), (_, theirs) in zip(named_leaves(model), named_leaves(other), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_folder(folder, shards=3)
    return folder


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    # Several chunks a tensor, and a last one that is shorter.
    monkeypatch.setattr(module, "_CHUNK_BYTES", 7 * 32 * 4)


@pytest.mark.smoke
def test_every_weight_stands_where_the_formulas_want_it(llama):
    theirs, ours = llama_tensors(), dict(named_leaves(read(llama, config_of())))
    D, N, K, H = 32, 8, 4, 6
    for i in range(2):
        layer = f"model.layers.{i}."
        for name, heads in (("q", N), ("k", K), ("v", K)):
            want = theirs[f"{layer}self_attn.{name}_proj.weight"].T.reshape(D, heads, H)
            np.testing.assert_array_equal(ours[f"layers/attention/{name}"][i], want)
        want = theirs[f"{layer}self_attn.o_proj.weight"].T.reshape(N, H, D)
        np.testing.assert_array_equal(ours["layers/attention/o"][i], want)
        for name in ("gate", "up", "down"):
            want = theirs[f"{layer}mlp.{name}_proj.weight"].T
            np.testing.assert_array_equal(ours[f"layers/mlp/{name}"][i], want)
        want = theirs[f"{layer}post_attention_layernorm.weight"]
        np.testing.assert_array_equal(ours["layers/mlp_norm/scale"][i], want)
    np.testing.assert_array_equal(ours["embedding"], theirs["model.embed_tokens.weight"])
    np.testing.assert_array_equal(ours["head"], theirs["lm_head.weight"])


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_mesh_holds_the_weights_of_one_device_and_writes_the_same_bytes(llama, tmp_path, mesh):
    one, many = read(llama, config_of()), read(llama, config_of(), mesh)
    assert_equal(many, one)
    assert any(not leaf.is_fully_replicated for _, leaf in named_leaves(many))
    for model, name in ((one, "one"), (many, "many")):
        write_weights(str(tmp_path / name), family_of(LLAMA), model, "float32")
    written = [(tmp_path / name / safetensors.WEIGHTS).read_bytes() for name in ("one", "many")]
    assert written[0] == written[1]
    for name, tensor in safetensors.open_folder(str(tmp_path / "many")).items():
        values = llama_tensors()[name]
        assert tensor.shape == values.shape
        np.testing.assert_array_equal(tensor.read(0, values.size), values.reshape(-1))
