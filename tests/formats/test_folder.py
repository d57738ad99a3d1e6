"""Hugging Face folders: the same weights on every mesh, and the same files back."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_families
from small_folders import LLAMA, llama_tensors, write_folder

from jaxgen.checkpoint.tree import named_leaves
from jaxgen.config import ServeConfig
from jaxgen.errors import UserError
from jaxgen.formats import folder as module
from jaxgen.formats import safetensors
from jaxgen.formats.families import DENSE, MIXTRAL, Family, Tensor, family_of
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


def filled(config, mesh=ONE):
    """A model of random numbers, the same on every mesh."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        return jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, abstract_model(config, mesh_of(mesh), "float32"))


def family_with(tensors):
    return Family("TestForCausalLM", "test", tensors, parts=())


def test_experts_are_a_tensor_each_on_every_mesh(tmp_path):
    config = config_of(moe=MoEConfig(num_experts=4, num_experts_per_tok=2))
    family, one = MIXTRAL, filled(config)
    write_weights(str(tmp_path), family, one, "float32")
    stored = safetensors.open_folder(str(tmp_path))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    want = np.asarray(one.layers.mlp.down)[1, 3].T
    np.testing.assert_array_equal(stored[name].read(0, want.size), want.reshape(-1))
    assert len([name for name in stored if ".experts." in name]) == 2 * 4 * 3
    for name, mesh in EXPERTS.items():
        many = read(tmp_path, config, mesh, family=family)
        assert_equal(many, one)
        write_weights(str(tmp_path / name), family, many, "float32")
        written = (tmp_path / name / safetensors.WEIGHTS).read_bytes()
        assert written == (tmp_path / safetensors.WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(pipeline=2, expert=2, fsdp=2), MeshConfig(fsdp=2, expert=2, tensor=2)],
    ids=["stages", "experts"],
)
def test_a_stack_may_be_read_a_tensor_at_a_time(tmp_path, monkeypatch, mesh):
    given = tiny_families.config_json("mixtral")
    family = family_of(given)
    config = ServeConfig(family.read(given))
    one = filled(config)
    write_weights(str(tmp_path), family, one, "float32")
    inserts, insert = [], module._insert
    monkeypatch.setattr(module, "_block", lambda stack, count: (1,) * len(stack))
    monkeypatch.setattr(module, "_insert", lambda sharding: inserts.append(1) or insert(sharding))
    assert_equal(read(tmp_path, config, mesh, family=family), one)
    layers, experts = 4 // mesh.pipeline, 4 // mesh.expert
    assert inserts.count(1) >= 3 * layers * experts + 4 * layers


@pytest.mark.parametrize(
    ("stack", "count", "block"),
    [
        ((), 5, ()),
        ((32,), 8, (8,)),
        ((30,), 8, (6,)),
        ((7,), 6, (1,)),
        ((4, 6), 4, (1, 3)),
        ((4, 6), 13, (2, 6)),
        ((4, 6), 99, (4, 6)),
    ],
)
def test_blocks_divide_a_stack(stack, count, block):
    assert module._block(stack, count) == block


def test_several_parameters_in_one_tensor_are_its_rows_one_after_the_other(tmp_path):
    qkv, gate_up = "model.layers.{layer}.qkv.weight", "model.layers.{layer}.gate_up.weight"
    q, k = "layers/attention/q", "layers/attention/k"
    fused = {
        q: Tensor(q, qkv, inputs=1),
        k: Tensor(k, qkv, inputs=1, after=(q,)),
        "layers/attention/v": Tensor("layers/attention/v", qkv, inputs=1, after=(q, k)),
        "layers/mlp/gate": Tensor("layers/mlp/gate", gate_up, inputs=1),
        "layers/mlp/up": Tensor("layers/mlp/up", gate_up, inputs=1, after=("layers/mlp/gate",)),
    }
    family = family_with(tuple(fused.get(tensor.ours, tensor) for tensor in DENSE))
    mesh = MESHES["all"]
    one, many = filled(config_of()), filled(config_of(), mesh)
    write_weights(str(tmp_path), family, many, "float32")
    tensor = safetensors.open_folder(str(tmp_path))["model.layers.1.qkv.weight"]
    parts = [np.asarray(getattr(one.layers.attention, name))[1].reshape(32, -1) for name in "qkv"]
    want = np.concatenate(parts, axis=1).T
    assert tensor.shape == want.shape
    np.testing.assert_array_equal(tensor.read(0, want.size), want.reshape(-1))
    assert_equal(read(tmp_path, config_of(), mesh, family=family), one)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_kept(tmp_path, dtype):
    write_folder(tmp_path / "in", tensors=llama_tensors(dtype=dtype))
    pretrained = open_model(tmp_path / "in")
    assert pretrained.stored_dtype == dtype
    # float16 has no place of its own: float32 holds all its values.
    assert pretrained.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    model = pretrained.read(abstract_model(config_of(), mesh_of(ONE), pretrained.dtype))
    assert {leaf.dtype.name for _, leaf in named_leaves(model)} == {pretrained.dtype}
    pretrained.write(str(tmp_path / "out"), model)
    stored = [safetensors.open_folder(str(tmp_path / name)) for name in ("in", "out")]
    for name, tensor in stored[0].items():
        again = stored[1][name]
        assert again.dtype == tensor.dtype
        num = tensor.nbytes // 2
        assert again.read(0, num).tobytes() == tensor.read(0, num).tobytes()


def test_float64_and_mixed_files_are_cast(tmp_path):
    tensors = llama_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    write_folder(tmp_path, tensors=tensors)
    model = read(tmp_path, config_of())
    np.testing.assert_array_equal(model.norm.scale[...], tensors["model.norm.weight"])
    assert open_model(tmp_path).stored_dtype == "float32"


@pytest.mark.parametrize(
    ("most", "norm", "said"),
    [
        (
            "bfloat16",
            "float32",
            "rounded 1 tensors of other dtypes to bfloat16, such as model.norm",
        ),
        ("float16", "float32", "rounded 1 tensors of other dtypes to float16, such as model.norm"),
        (
            "bfloat16",
            "float16",
            "rounded 1 tensors of other dtypes to bfloat16, such as model.norm",
        ),
        ("float32", "float16", ""),
        ("bfloat16", "bfloat16", ""),
    ],
)
def test_what_loses_bits_is_named_once(tmp_path, capsys, most, norm, said):
    tensors = llama_tensors(dtype=most)
    name = "model.norm.weight"
    write_folder(tmp_path / "in", tensors=tensors | {name: tensors[name].astype(norm)})
    (tmp_path / "in" / "additional_chat_templates").mkdir()
    (tmp_path / "in" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 1 }}")
    pretrained = open_model(tmp_path / "in")
    model = pretrained.read(abstract_model(config_of(), mesh_of(ONE), pretrained.dtype))
    pretrained.write(str(tmp_path / "out"), model)
    lines = [line for line in capsys.readouterr().err.splitlines() if "rounded" in line]
    assert lines == [f"{tmp_path / 'in'}: {said}.weight"] * bool(said)
    # What else the folder holds comes along.
    kept = tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja"
    assert kept.read_text() == "{{ 1 }}"


def test_no_bits_are_said_to_be_lost_where_none_are(tmp_path, capsys):
    tensors = llama_tensors(dtype="bfloat16")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    write_folder(tmp_path, tensors=tensors)
    open_model(tmp_path).read(abstract_model(config_of(), mesh_of(ONE), "float32"))
    assert "rounded" not in capsys.readouterr().err


def test_what_float16_cannot_hold_is_refused(tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = 1e5
    write_folder(tmp_path / "in", tensors=tensors)
    model = read(tmp_path / "in", config_of())
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*float16.*use bfloat16"):
        write_weights(str(tmp_path / "out"), family_of(LLAMA), model, "float16")


def test_a_table_may_be_there_twice_where_it_is_tied(tmp_path):
    given = LLAMA | {"tie_word_embeddings": True}
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32)}
    tensors = llama_tensors(given)
    table = tensors["model.embed_tokens.weight"]
    write_folder(tmp_path, given, tensors | angles | {"lm_head.weight": table})
    model = read(tmp_path, config_of(given))
    assert not hasattr(model, "head")
    for other in (np.ones((272, 31), np.float32), table + (np.arange(272) == 271)[:, None]):
        write_folder(tmp_path, given, tensors | {"lm_head.weight": other.astype(np.float32)})
        line = r"lm_head\.weight differs from model\.embed_tokens\.weight, to which tie_word_emb"
        with pytest.raises(UserError, match=line):
            read(tmp_path, config_of(given))
    # But it must be there where it is not tied.
    tensors = llama_tensors(given)
    write_folder(tmp_path, LLAMA, tensors)
    with pytest.raises(UserError, match=r"no tensor lm_head\.weight, which is \[272, 32\] by its"):
        read(tmp_path, config_of())


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        (
            "model.norm.weight",
            None,
            r"no tensor model\.norm\.weight, which is \[32\] by",
        ),
        (
            "model.layers.1.mlp.down_proj.weight",
            (32, 40),
            r"tensor model\.layers\.1\.mlp\.down_proj\.weight is \[32, 40\] in .* and \[32, 48\]",
        ),
        (
            "model.layers.2.mlp.down_proj.weight",
            (32, 48),
            r"tensor model\.layers\.2\.mlp\.down_proj\.weight \[32, 48\] in .* has no place in a "
            "LlamaForCausalLM of its config; ",
        ),
        (
            "model.layers.0.self_attn.q_proj.bias",
            (48,),
            r"tensor model\.layers\.0\.self_attn\.q_proj\.bias \[48\] .* has no place",
        ),
    ],
)
def test_files_that_disagree_with_the_config_are_refused_before_they_are_read(
    tmp_path, monkeypatch, name, change, line
):
    tensors = llama_tensors()
    if change is None:
        del tensors[name]
    else:
        tensors[name] = np.zeros(change, np.float32)
    write_folder(tmp_path, tensors=tensors)
    monkeypatch.setattr(safetensors.Stored, "read", lambda *args: pytest.fail("it was read"))
    with pytest.raises(UserError, match=line) as error:
        read(tmp_path, config_of())
    assert "\n" not in str(error.value)


def test_a_parameter_without_a_place_is_named():
    family = family_with(tuple(tensor for tensor in DENSE if tensor.ours != "norm/scale"))
    with pytest.raises(UserError, match="TestForCausalLM has no tensor for the parameter norm/sca"):
        write_weights("memory://nowhere", family, filled(config_of()), "float32")


def test_a_folder_may_be_in_any_store(llama, monkeypatch):
    monkeypatch.setattr(safetensors, "MAX_FILE_BYTES", 20_000)
    model = read(llama, config_of())
    write_weights("memory://there", family_of(LLAMA), model, "bfloat16")
    stored = safetensors.open_folder("memory://there")
    assert len({tensor.url for tensor in stored.values()}) > 2
    again = read("memory://there", config_of(), MESHES["all"])
    for (name, a), (_, b) in zip(named_leaves(model), named_leaves(again), strict=True):
        half = np.asarray(a).astype(jax.numpy.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(half, np.asarray(b), err_msg=name)


def test_what_several_processes_gather_is_what_one_does(llama):
    """One process may put a tensor together on the host; several replicate it first."""
    for mesh in (MESHES["pipeline"], MESHES["fsdp"]):
        for _, leaf in named_leaves(read(llama, config_of(), mesh)):
            index = (1,) if leaf.ndim > 2 else ()
            replicated = module._replicate(leaf, index)
            assert replicated.is_fully_replicated
            np.testing.assert_array_equal(replicated, module._gather(leaf, index))


def test_weights_can_be_given_away(llama):
    """Copies on several CPU devices may be one buffer, which no program may write into."""
    model = read(llama, config_of(), MESHES["fsdp"])
    before = {name: np.array(leaf) for name, leaf in named_leaves(model)}
    add = jax.jit(lambda model: jax.tree.map(lambda leaf: leaf + 1, model), donate_argnums=0)
    for name, leaf in named_leaves(add(model)):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, before[name][shard.index] + 1)


@pytest.mark.parametrize("case", tiny_families.CASES)
def test_every_family_comes_and_goes(tmp_path, case):
    given = tiny_families.config_json(case)
    family = family_of(given)
    config = family.read(given)
    tensors = tiny_families.tensors_of(family, config)
    write_folder(tmp_path / "in", given, tensors)
    pretrained = open_model(tmp_path / "in")
    assert pretrained.config == config
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    model = pretrained.read(abstract_model(pretrained.serve_config(), mesh_of(mesh), "float32"))
    want = tiny_families.from_theirs(family, model, tensors)
    for name, leaf in named_leaves(model):
        np.testing.assert_array_equal(np.asarray(leaf), want[name], err_msg=name)
    pretrained.write(str(tmp_path / "out"), model)
    stored = safetensors.open_folder(str(tmp_path / "out"))
    assert stored.keys() == tensors.keys()
    for name, tensor in stored.items():
        values = tensors[name]
        assert tensor.shape == values.shape
        np.testing.assert_array_equal(tensor.read(0, values.size), values.reshape(-1))
