"""A run that starts from a published model remains one of its kind."""

import dataclasses
import json

import jax
import pytest
from small_runs import LLAMA, ONE, run_config

from jaxgen.config import ServeConfig
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.formats.families import PHI3
from jaxgen.formats.folder import write_folder
from jaxgen.nn.lora import LoRAConfig
from jaxgen.pretrained import load_model, open_model
from jaxgen.sharding import make_mesh
from jaxgen.train.loop import LoopConfig, train
from jaxgen.train.program import make_state

GENERATION = {"eos_token_id": [5, 7], "do_sample": True, "temperature": 0.5, "top_k": 9}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "hf"
    model = make_state(run_config(folder.parent), make_mesh(ONE, jax.devices()[:1])).model
    given = {**PHI3.write(dataclasses.replace(LLAMA, vocab_size=264)), "their_own_key": None}
    tokenizer = Tokenizer.from_bytes()
    more = {"dtype": "float32", "tokenizer": tokenizer, "generation": GENERATION}
    write_folder(str(folder), PHI3, given, model, **more)
    return folder


def run_from(origin, folder, **changes):
    config = run_config(
        folder, init=str(origin), train=LoopConfig(steps=1, batch_size=8, seq_len=16)
    )
    config = dataclasses.replace(config, model=open_model(origin).config, **changes)
    train(config, folder / "run", make_mesh(ONE, jax.devices()[:1]))
    return folder / "run"


@pytest.fixture(scope="module")
def run(published, tmp_path_factory):
    return run_from(published, tmp_path_factory.mktemp("run"))


def test_a_run_ends_and_samples_as_its_origin(published, run):
    assert open_model(published).generation.stop_ids == (5, 7, Tokenizer.from_bytes().eos_id)
    assert open_model(run).generation == open_model(published).generation


def test_a_run_is_exported_as_what_it_was(published, run, tmp_path):
    mesh, found = make_mesh(ONE, jax.devices()[:1]), open_model(run)
    config = ServeConfig(found.config, ONE)
    model, _ = load_model(found, config, mesh)
    found.write(str(tmp_path / "out"), model)
    for name in ("config.json", "generation_config.json"):
        theirs, ours = (json.loads((at / name).read_text()) for at in (published, tmp_path / "out"))
        assert ours == theirs
    # A model that was trained further still is what the first one was.
    again = open_model(run_from(run, tmp_path / "again"))
    assert again.published == found.published


def test_adapters_beside_a_run_are_not_for_peft(run, tmp_path):
    lora = LoRAConfig(rank=2, targets=("o", "down"))
    tuned = open_model(run_from(run, tmp_path, lora=lora))
    assert tuned.generation.temperature == 0.5
    with pytest.raises(UserError, match=r"which peft cannot load; export that with jaxgen convert"):
        tuned.write_adapter(str(tmp_path / "out"))
