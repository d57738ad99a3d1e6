"""A MODEL, whatever it is: a run, a checkpoint of one, a Hugging Face folder; and back to one."""

import json
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from formats.small_folders import LLAMA, llama_tensors, write_file, write_folder

from jaxgen.checkpoint.manager import CheckpointManager
from jaxgen.checkpoint.tree import named_leaves
from jaxgen.cli import main
from jaxgen.config import TrainConfig, save_config
from jaxgen.data.config import DataConfig
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.formats.families import family_of
from jaxgen.models.config import ComputeConfig
from jaxgen.pretrained import GenerationDefaults, abstract_model, load_model, open_model
from jaxgen.sharding import MeshConfig, Rules, make_mesh

CONFIG = family_of(LLAMA).read(LLAMA)


class State(NamedTuple):
    model: Any


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_folder(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder, mesh):
    """A run with checkpoints of two steps; the second is of the folder's weights."""
    run = tmp_path_factory.mktemp("run")
    compute = ComputeConfig(dtype="float32")
    config = TrainConfig("mine", CONFIG, DataConfig(), compute=compute, rules=Rules(vocab=None))
    save_config(config, run)
    Tokenizer.from_bytes().save(str(run / "tokenizer"))
    model, _ = load_model(folder, config, mesh)
    with CheckpointManager(run / "checkpoints") as checkpoints:
        checkpoints.save(1, State(jax.tree.map(lambda leaf: leaf * 0, model)), {})
        checkpoints.save(2, State(model), {})
    return run


def weights(model):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(model)}


def assert_equal(model, other):
    jax.tree.map(np.testing.assert_array_equal, weights(model), weights(other))


@pytest.mark.smoke
def test_a_run_a_checkpoint_and_a_folder_are_models(run, folder, mesh):
    newest, first, pretrained = map(open_model, (run, f"{run}/checkpoints/00000001", folder))
    assert newest.config == first.config == pretrained.config == CONFIG
    assert newest.dtype == pretrained.dtype == "float32"
    # A run is computed as it was, a folder as we do by default.
    assert (newest.compute.dtype, newest.rules.vocab) == ("float32", None)
    assert (pretrained.compute, pretrained.rules) == (ComputeConfig(), Rules())
    models = []
    for one in (newest, first, pretrained):
        model, tokenizer = load_model(one, one.serve_config(), mesh)
        assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
        models.append(model)
    assert_equal(models[0], models[2])
    assert not any(values.any() for values in weights(models[1]).values())


def test_weights_are_kept_in_the_dtype_that_is_asked_for(run, folder):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=2))
    for location in (run, folder):
        config = open_model(location).serve_config()
        whole, _ = load_model(location, config, mesh)
        half, _ = load_model(location, config, mesh, "bfloat16")
        for name, values in weights(half).items():
            assert values.dtype == jax.numpy.bfloat16
            np.testing.assert_array_equal(values, weights(whole)[name].astype(values.dtype))


def test_a_run_becomes_a_folder_and_a_folder_stays_one(run, folder, mesh, tmp_path):
    for location, name in ((run, "run"), (folder, "folder")):
        pretrained = open_model(location)
        model, tokenizer = load_model(location, pretrained.serve_config(), mesh)
        pretrained.write(str(tmp_path / name), model)
        again = open_model(tmp_path / name)
        assert again.config == CONFIG
        read, tokenizer_again = load_model(again, again.serve_config(), mesh)
        assert_equal(read, model)
        assert tokenizer_again.fingerprint == tokenizer.fingerprint
        assert again.generation == pretrained.generation
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "folder" / file).read_bytes() == (folder / file).read_bytes()
    given = json.loads((tmp_path / "run" / "config.json").read_text())
    assert given["architectures"] == ["LlamaForCausalLM"]
    assert given["torch_dtype"] == "float32"
    tokenizer = Tokenizer.load(str(run / "tokenizer"))
    assert (given["bos_token_id"], given["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)


def test_another_dtype_is_said_in_the_config(folder, mesh, tmp_path):
    pretrained = open_model(folder)
    model, _ = load_model(pretrained, pretrained.serve_config(), mesh)
    pretrained.write(str(tmp_path), model, "float16")
    assert json.loads((tmp_path / "config.json").read_text()) == LLAMA | {"torch_dtype": "float16"}
    assert open_model(tmp_path).stored_dtype == "float16"
    half, _ = load_model(tmp_path, pretrained.serve_config(), mesh)
    for name, values in weights(half).items():
        want = weights(model)[name].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(values, want)


@pytest.mark.parametrize(
    ("said", "defaults"),
    [
        (None, (None, None, None)),
        ({}, (None, None, None)),
        ({"do_sample": False, "temperature": 0.7}, (0.0, None, None)),
        ({"temperature": 0.7, "top_p": 0.9}, (0.0, None, 0.9)),
        ({"do_sample": True}, (1.0, None, None)),
        ({"do_sample": True, "temperature": None, "top_k": None}, (1.0, None, None)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}, (0.6, 20, 0.9)),
        ({"min_p": 0.1, "repetition_penalty": 1.1}, (0.0, None, None, 0.1, 1.1)),
    ],
)
def test_generation_defaults_are_those_of_the_folder(tmp_path, said, defaults):
    write_folder(tmp_path, LLAMA, {}, said)
    assert open_model(tmp_path).generation == GenerationDefaults((257,), *defaults)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"temperature": "0.6"}, "temperature='0.6' is no float"),
        ({"do_sample": "yes"}, "do_sample='yes' is no bool"),
        ({"top_k": 2.5}, "top_k=2.5 is no int"),
        ({"top_p": [1]}, r"top_p=\[1\] is no float"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' is no int"),
        ({"eos_token_id": [99999999999]}, r"eos_token_id=\[99999999999\] is no token of .* 272"),
        ({"eos_token_id": [[1]]}, r"eos_token_id=\[\[1\]\] is no token"),
        ({"eos_token_id": [-1]}, r"eos_token_id=\[-1\] is no token"),
        ({"eos_token_id": 272}, "eos_token_id=272 is no token"),
        ({"eos_token_id": [True]}, r"eos_token_id=\[True\] is no token"),
    ],
)
def test_generation_defaults_of_another_kind_are_one_line(tmp_path, said, line):
    write_folder(tmp_path, LLAMA, {}, said)
    with pytest.raises(UserError, match=rf"^generation_config\.json: {line}.*; correct it$"):
        _ = open_model(tmp_path).generation
    if "eos_token_id" in said:
        write_folder(tmp_path, LLAMA | said, {}, {})
        with pytest.raises(UserError, match=rf"^config\.json: {line}"):
            _ = open_model(tmp_path).generation


def test_what_would_change_an_answer_and_does_not_is_named(tmp_path, capsys):
    neutral = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None}
    harmless = {"max_length": 20, "transformers_version": "5", "pad_token_id": 3}
    write_folder(tmp_path, LLAMA, {}, neutral | harmless)
    _ = open_model(tmp_path).generation
    assert capsys.readouterr().err == ""
    changing = {"num_beams": 4, "typical_p": 0.9, "bad_words_ids": [[7]], "suppress_tokens": [1]}
    write_folder(tmp_path, LLAMA, {}, neutral | changing)
    _ = open_model(tmp_path).generation
    said = "ignored bad_words_ids, num_beams, suppress_tokens, typical_p: not known"
    assert capsys.readouterr().err == f"generation_config.json: {said}\n"


def test_every_end_that_is_named_ends_an_answer(tmp_path):
    given = LLAMA | {"eos_token_id": [3, 4]}
    write_folder(tmp_path, given, {}, {"eos_token_id": 5, "do_sample": False})
    assert open_model(tmp_path).generation.stop_ids == (5, 3, 4, 257)
    write_folder(tmp_path, LLAMA | {"eos_token_id": None}, {}, {"eos_token_id": [3, 257]})
    assert open_model(tmp_path).generation.stop_ids == (3, 257)


def test_a_run_ends_where_its_tokenizer_does(run):
    assert open_model(run).generation == GenerationDefaults((257,))


def test_a_model_that_does_not_fit_the_mesh_is_told_what_would(tmp_path):
    """SmolLM2 has 9 heads."""
    given = LLAMA | {"num_attention_heads": 9, "num_key_value_heads": 3}
    write_folder(tmp_path, given)
    config = open_model(tmp_path).serve_config()
    mesh = make_mesh(MeshConfig(tensor=2, fsdp=4))
    line = (
        r"model\.num_heads=9 is not divisible by mesh\.tensor=2; use mesh\.tensor=1, or "
        r"rules\.heads=None to replicate it"
    )
    with pytest.raises(UserError, match=line):
        load_model(tmp_path, config, mesh)
    with pytest.raises(UserError, match=line):
        config.check(mesh)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "is no model; give a run directory .* or a Hugging Face folder"),
        ({"config.json": "{"}, r"config\.json is not a JSON object"),
        ({"config.json": "[1]"}, r"config\.json is not a JSON object"),
        ({"config.json": '{"architectures": ["BertModel"]}'}, "BertModel is not supported; use on"),
        ({"config.json": '{"name": "x"}'}, "config.json"),
    ],
)
def test_what_is_no_model_is_one_line(tmp_path, files, line):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=line) as error:
        open_model(tmp_path)
    assert "\n" not in str(error.value)


def test_broken_files_are_named_before_any_is_read(tmp_path, mesh):
    tensors = llama_tensors()
    write_folder(tmp_path, tensors=tensors)
    config = open_model(tmp_path).serve_config()
    (tmp_path / "tokenizer.json").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        load_model(tmp_path, config, mesh)
    (tmp_path / "away").rename(tmp_path / "tokenizer.json")
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    write_file(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match=r"model\.norm\.weight is \[31\] .* and \[32\] by its"):
        load_model(tmp_path, config, mesh)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has neither model\.safetensors"):
        load_model(tmp_path, config, mesh)


def test_abstract_models_have_no_repeats(folder, mesh):
    model = abstract_model(open_model(folder).serve_config(), mesh, "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"bfloat16"}
    assert model.layers.mlp.up.shape == (2, 32, 48)


def test_a_chat_template_that_fails_is_known_before_weights_are_read(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    monkeypatch.setattr("jaxgen.compiler.enable_compilation_cache", lambda: None)
    monkeypatch.setattr("jaxgen.pretrained.load_model", lambda *_: pytest.fail("it was read"))
    assert main(["generate", str(tmp_path), "--chat", "--prompt", "x"]) == 2
    assert "the chat template fails: " in capsys.readouterr().err
