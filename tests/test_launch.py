"""The scripts that users copy, as they run them: processes of their own on a simulated mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxgen.sharding import AXES

ROOT = Path(__file__).parents[1]
SMALL = """
model.vocab_size=264 model.num_layers=2 model.embed_dim=32 model.num_heads=2 model.num_kv_heads=2
model.head_dim=16 model.mlp_dim=64 model.max_seq_len=128 compute.dtype=float32 data.tokenizer=bytes
mesh.fsdp=2 mesh.tensor=2 optimizer.warmup_steps=2 optimizer.learning_rate=0.01
train.steps=12 train.batch_size=8 train.seq_len=32 eval.every_steps=0 metrics.tensorboard=false
"""


def started(script, *args, folder=None):
    """Runs a script on four simulated devices."""
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
    }
    command = [sys.executable, str(ROOT / "launch" / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environ, cwd=folder)


def run(script, *args):
    """Returns what a script printed."""
    done = started(script, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory that launch/train.py has made."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "texts").mkdir()
    for number in range(40):
        text = f"def number_{number}():\n    return {number}\n" * (1 + number % 3)
        (folder / "texts" / f"{number}.txt").write_text(text)
    source = json.dumps([{"kind": "text", "path": f"{folder}/texts/*.txt"}])
    run("train.py", folder / "run", f"data.sources={source}", *SMALL.split())
    return folder / "run"


def test_train_makes_a_run_that_learns(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    config = json.loads((trained / "config.json").read_text())
    split = {axis: config["mesh"][axis] for axis in AXES if config["mesh"][axis] != 1}
    assert split == {"fsdp": 2, "tensor": 2}


def test_generate_continues_each_prompt_from_run_and_checkpoint(trained):
    prompts = ["def num", "return "]
    texts = run("generate.py", trained, *prompts)
    assert texts.startswith(prompts[0])
    assert f"\n{prompts[1]}" in texts
    assert len(texts) > sum(map(len, prompts)) + 20
    (newest,) = (trained / "checkpoints").glob("*12")
    assert run("generate.py", newest, *prompts) == texts


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ("run", "train.steps"), "train.steps sets nothing; use field=value"),
        ("train.py", ("run", "train.stesp=1"), "no field --train.stesp; did you mean"),
        ("generate.py", ("nowhere",), "nowhere is no model; give a run directory"),
    ],
)
def test_a_mistake_is_one_line(script, arguments, message, tmp_path):
    done = started(script, *arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_help_does_nothing_else(script, tmp_path):
    done = started(script, "--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python3 {script} gs://BUCKET/" in done.stdout
    assert not list(tmp_path.iterdir())
