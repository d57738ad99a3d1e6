import errno
import json
import sys
from pathlib import Path

import pytest
from etils import epath
from jax.sharding import AbstractMesh

from jaxgen import fields
from jaxgen.config import TrainConfig, load_config, read_config, save_config
from jaxgen.errors import UserError
from jaxgen.sharding import AXES

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
# Config -> the devices its docstring names.
SHIPPED = {
    "tiny.py": 8,
    "gpt_125m.py": 1,
    "llama3_8b.py": 16,
    "llama3_8b.py:v5p": 32,
    "mixtral_8x7b.py": 128,
    "sft.py": 1,
    "sft.py:lora": 1,
}


def shipped(source, overrides=None):
    return load_config(str(ROOT / "configs" / source), overrides)


def golden_path(source):
    return GOLDEN / f"{source.replace('.py', '').replace(':', '.')}.json"


def golden_text(source):
    return json.dumps(fields.to_json(shipped(source)), indent=2) + "\n"


def mesh_of(config, num_devices):
    sizes = config.mesh.resolve(num_devices).sizes
    return AbstractMesh(tuple(sizes.values()), AXES)


def test_every_shipped_config_is_listed():
    files = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert files == {source.partition(":")[0] for source in SHIPPED}


@pytest.mark.smoke
@pytest.mark.parametrize("source", SHIPPED)
def test_resolved_config_is_the_golden_one(source):
    """If the change is meant: python tests/test_config.py writes them anew."""
    assert golden_path(source).read_text() == golden_text(source)


@pytest.mark.smoke
@pytest.mark.parametrize("source", SHIPPED)
def test_golden_config_reads_back_equal(source):
    data = json.loads(golden_path(source).read_text())
    assert fields.from_json(TrainConfig, data) == shipped(source)


@pytest.mark.parametrize("source", SHIPPED)
def test_shipped_config_fits_its_devices(source):
    config = shipped(source)
    config.check(mesh_of(config, SHIPPED[source]))


@pytest.mark.parametrize(
    ("source", "low", "high"),
    [
        ("tiny.py", 4e6, 6e6),
        ("gpt_125m.py", 115e6, 130e6),
        ("llama3_8b.py", 8.03e9, 8.04e9),
        ("mixtral_8x7b.py", 46.7e9, 46.71e9),
    ],
)
def test_shipped_config_has_the_size_of_its_name(source, low, high):
    assert low < shipped(source).model.num_params < high


def test_fewer_than_100_fields_each_with_a_docstring():
    """Those of an option that is None, such as experts, are not among them."""
    leaves = [field for field in fields.walk(shipped("tiny.py")) if not field.is_group]
    assert len([field for field in leaves if not field.in_absent_group]) < 100
    assert [field.path for field in leaves if not field.doc] == []


def test_overrides_apply_to_the_file():
    config = shipped("tiny.py", {"train.steps": "7", "model.rope_scaling.factor": "2"})
    assert config.train.steps == 7
    assert config.model.rope_scaling.factor == 2.0
    assert config.model.embed_dim == shipped("tiny.py").model.embed_dim


def test_a_config_file_may_import_its_neighbour_and_give_functions(tmp_path):
    (tmp_path / "base_for_test.py").write_text((ROOT / "configs" / "tiny.py").read_text())
    (tmp_path / "debug.py").write_text(
        "import dataclasses\n"
        "from base_for_test import config as base\n"
        "def short():\n"
        "    return dataclasses.replace(base, name='short')\n"
    )
    path = list(sys.path)
    assert load_config(f"{tmp_path}/debug.py:short").name == "short"
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("config = 3", "", "bad.py:config is a int; make it a TrainConfig"),
        ("x = 3", "", "bad.py has no 'config'; it has no TrainConfig"),
        ("from jaxgen import *\nconfig = (", "", "bad.py:2: '(' was never closed"),
        ("a = 1\nconfig = nme", "", "bad.py:2: NameError: name 'nme' is not defined"),
        ("import nope", "", "bad.py:1: ModuleNotFoundError: No module named 'nope'"),
        ("def config():\n    return 1 / 0", "", "bad.py:2: ZeroDivisionError"),
        ("from jaxgen import MeshConfig\nconfig = MeshConfig()", "", "is a MeshConfig; make it"),
    ],
)
def test_a_bad_config_file_is_one_line(tmp_path, text, name, message):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(f"{tmp_path}/bad.py{name}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_of_ours_keeps_its_traceback(tmp_path):
    (tmp_path / "bug.py").write_text("import json\nconfig = json.loads('{')")
    with pytest.raises(json.JSONDecodeError):
        load_config(f"{tmp_path}/bug.py")


def test_missing_files_and_names_get_a_suggestion():
    with pytest.raises(UserError, match=r"no config file .*tinny.py; did you mean .*tiny.py\?"):
        shipped("tinny.py")
    with pytest.raises(UserError, match="has no 'v5e'; it has config, v5p"):
        shipped("llama3_8b.py:v5e")


@pytest.mark.parametrize(
    ("overrides", "num_devices", "message"),
    [
        (
            {},
            6,
            "needs 8 devices and there are 6; use mesh.data=1 mesh.fsdp=3 mesh.tensor=2, or",
        ),
        (
            {"mesh.expert": "2", "mesh.data": "1"},
            8,
            "mesh.expert=2 splits experts and model.moe is None; use mesh.expert=1 mesh.fsdp=4",
        ),
        (
            {
                "mesh.expert": "4",
                "mesh.data": "1",
                "mesh.fsdp": "1",
                "model.moe.num_experts": "6",
                "model.moe.num_experts_per_tok": "2",
            },
            8,
            "model.moe.num_experts=6 is not divisible by mesh.expert=4; use mesh.expert=2",
        ),
        (
            {"mesh.pipeline": "8", "mesh.data": "1", "mesh.fsdp": "1", "mesh.tensor": "1"},
            8,
            "model.num_layers=4 is not divisible by mesh.pipeline=8 x "
            "compute.pipeline.num_repeats=1; use mesh.pipeline=4 compute.pipeline.num_repeats=1",
        ),
        (
            {"mesh.pipeline": "2", "mesh.data": "1", "compute.pipeline.num_microbatches": "3"},
            8,
            "compute.pipeline.num_microbatches=3 is not a multiple of mesh.pipeline=2; use 4",
        ),
        (
            {"compute.expert_dispatch": "all_to_all"},
            8,
            "compute.expert_dispatch='all_to_all' and model.moe is None; give the model experts",
        ),
        (
            {"mesh.context": "2", "mesh.data": "1", "train.seq_len": "130"},
            8,
            "train.seq_len=130 is not divisible by 4, as sequences over mesh.context=2 x "
            "mesh.tensor=2 need; use train.seq_len=132",
        ),
        (
            {"train.seq_len": "31"},
            8,
            "train.seq_len=31 is not divisible by 2, as sequences over mesh.tensor=2 need",
        ),
        (
            {"mesh.tensor": "8", "mesh.data": "1", "mesh.fsdp": "1"},
            8,
            "model.num_heads=4 is not divisible by mesh.tensor=8; use mesh.tensor=4, or",
        ),
        ({"mesh.tensor": "4", "mesh.data": "1"}, 8, "model.num_kv_heads=2 is not divisible by"),
        ({"model.mlp_dim": "765"}, 8, "model.mlp_dim=765 is not divisible by mesh.tensor=2"),
        ({"model.vocab_size": "8193"}, 8, "model.vocab_size=8193 is not divisible by"),
        ({"model.embed_dim": "255"}, 8, "model.embed_dim=255 is not divisible by mesh.fsdp=2"),
        (
            {"train.batch_size": "6"},
            8,
            "train.batch_size=6 is not divisible by mesh.data=2 x mesh.fsdp=2; "
            "use train.batch_size=8",
        ),
        (
            {"train.batch_size": "16", "train.grad_accum_steps": "3"},
            8,
            "train.batch_size=16 is not divisible by train.grad_accum_steps=3 x mesh.data=2 x "
            "mesh.fsdp=2; use train.batch_size=24",
        ),
        ({"train.seq_len": "512"}, 8, "train.seq_len=512 is longer than model.max_seq_len=256"),
    ],
)
def test_fields_that_disagree_are_named_with_a_way_out(overrides, num_devices, message):
    config = shipped("tiny.py", overrides)
    with pytest.raises(UserError) as error:
        config.check(mesh_of(config, num_devices))
    assert message in str(error.value)


@pytest.mark.smoke
def test_a_run_directory_gives_its_config_back(tmp_path):
    config = shipped("llama3_8b.py", {"optimizer.learning_rate": "0.1"})
    save_config(config, tmp_path)
    assert read_config(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"nam": "x"}', "config.json: no field 'nam'; did you mean name?"),
        ("{}", "config.json: name has no value and no default"),
    ],
)
def test_a_damaged_config_json_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    assert message in str(error.value)


def test_a_folder_without_a_config_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json; give a run directory"):
        read_config(tmp_path)


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/run/config.json: Not a directory;"):
        save_config(shipped("tiny.py"), tmp_path / "file" / "run")


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(path, text):
        Path(path).touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(epath.Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device; give another --run-dir"):
        save_config(shipped("tiny.py"), tmp_path)
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    for source in SHIPPED:
        golden_path(source).write_text(golden_text(source))
