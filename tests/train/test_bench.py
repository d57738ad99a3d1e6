import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import run_config

from jaxgen import cli
from jaxgen.errors import UserError
from jaxgen.sharding import MeshConfig
from jaxgen.train.bench import bench_train, process_start_s, table
from jaxgen.train.program import abstract_batch, abstract_state

STEPS = 6
SPLIT = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The config, the results, and the seconds that all of it took."""
    folder = tmp_path_factory.mktemp("bench")
    config = run_config(folder, SPLIT)
    before = sorted(folder.iterdir())
    start = time.perf_counter()
    results = bench_train(config, STEPS)
    seconds = time.perf_counter() - start
    assert sorted(folder.iterdir()) == sorted([*before, folder / "cache"])
    return config, results, seconds


def test_times_add_up(bench):
    _, results, seconds = bench
    times = results["step_times_s"]
    assert len(times) == results["steps"] == STEPS
    assert min(times) > 0
    assert results["first_step_s"] + sum(times) <= seconds
    # Data and parameters get ready while the step compiles; the first step needs all of them.
    for part in ("data_s", "state_s"):
        assert results[part] > 0
    assert results["data_s"] + results["state_s"] < results["first_step_s"]
    assert 0 < results["lower_s"] + results["compile_s"] < results["first_step_s"]
    assert 0 <= results["data_wait_share"] < 1


def test_summary_is_of_the_steps_timed(bench):
    config, results, _ = bench
    times = np.array(results["step_times_s"])
    assert results["step_s_median"] == pytest.approx(np.median(times))
    assert results["step_s_p10"] == pytest.approx(np.quantile(times, 0.1))
    assert results["step_s_p90"] == pytest.approx(np.quantile(times, 0.9))
    places = STEPS * config.train.batch_size * config.train.seq_len
    counted = results["tokens_per_s"] * times.sum()
    assert counted == pytest.approx(round(counted))
    assert places / 2 < counted < places


def test_says_what_it_ran_on(bench):
    config, results, _ = bench
    assert results["devices"] == 8
    assert results["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert (results["platform"], results["processes"]) == ("cpu", 1)
    assert results["versions"]["jax"] == jax.__version__
    assert results["model_params"] == config.model.num_params
    # A CPU says neither how fast nor how full it is.
    assert results["mfu"] is None
    assert results["peak_memory_measured_bytes"] is None
    assert results["compile_cache"] in ("hit", "miss")


def test_compiled_peak_holds_the_state_the_batch_and_more(bench):
    config, results, _ = bench
    mesh = jax.make_mesh(
        (2, 2, 1, 1, 2, 1), ("data", "fsdp", "pipeline", "context", "tensor", "expert")
    )
    arguments = abstract_state(config, mesh), abstract_batch(config, mesh)
    one_device = sum(
        leaf.dtype.itemsize * np.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(arguments)
    )
    assert one_device < results["peak_memory_compiled_bytes"] < 100 * one_device


def test_table_has_all_but_single_steps(bench):
    _, results, _ = bench
    lines = table(results).splitlines()
    assert len(lines) == len(results) - 1
    for name, text in {
        "step_s_median": f"{results['step_s_median']:.4g}",
        "peak_memory_measured": "unknown on this device",
        "mesh": "data=2 fsdp=2 tensor=2",
        "data_wait": f"{results['data_wait_share']:.1%}",
    }.items():
        assert any(line.split(maxsplit=1) == [name, text] for line in lines), name


def test_no_steps_are_refused(tmp_path):
    with pytest.raises(UserError, match="--steps 0; use 1 or more"):
        bench_train(run_config(tmp_path), 0)


def test_process_start_is_when_the_process_was_started():
    code = (
        "import time; time.sleep(0.3); from jaxgen.train.bench import process_start_s;"
        "print(time.perf_counter() - process_start_s())"
    )
    before = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lived = time.perf_counter() - before
    assert 0.3 < float(done.stdout) < lived + 0.02
    assert process_start_s() < before


def test_command_prints_one_json_object_from_the_start_of_the_process(
    tmp_path, monkeypatch, capsys
):
    seen = {}

    def fake(config, steps, *, started_s):
        seen.update(steps=steps, started_s=started_s)
        return {"name": config.name}

    # The command would move the suite's cache of compiled programs.
    monkeypatch.setattr("jaxgen.compiler.enable_compilation_cache", lambda: None)
    monkeypatch.setattr("jaxgen.train.bench.bench_train", fake)
    tiny = str(Path(__file__).parents[2] / "configs" / "tiny.py")
    assert cli.main(["bench", "train", tiny, "--json", "--steps", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "tiny"}
    assert seen["steps"] == 3
    assert seen["started_s"] == pytest.approx(process_start_s(), abs=0.05)
    assert cli.main(["bench", "train", tiny]) == 0
    assert capsys.readouterr().out == "name  tiny\n"
    assert seen["steps"] == 20
