"""Two processes of two devices train what one process of four trains."""

import json

import jax
import pytest
from processes import run_processes
from small_runs import max_relative, run_config

from jaxgen import fields
from jaxgen.checkpoint.manager import CheckpointConfig
from jaxgen.sharding import MeshConfig, make_mesh
from jaxgen.train.evaluate import EvalConfig
from jaxgen.train.loop import LoopConfig, train

pytestmark = pytest.mark.slow

SCRIPT = """
    import json
    from jaxgen.compiler import enable_compilation_cache
    from jaxgen.config import TrainConfig
    from jaxgen.fields import from_json
    from jaxgen.train.loop import train

    enable_compilation_cache(sys.argv[3])
    config = from_json(TrainConfig, json.loads(sys.argv[1]))
    state = train(config, sys.argv[2])
    print("done", int(state.step))
    """


@pytest.fixture
def config(tmp_path):
    return run_config(
        tmp_path,
        MeshConfig(data=2, fsdp=2),
        train=LoopConfig(steps=5, batch_size=8, seq_len=32),
        eval=EvalConfig(every_steps=5, batches=1),
        checkpoint=CheckpointConfig(save_every_steps=3),
    )


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_does(config, tmp_path):
    train(config, tmp_path / "one", make_mesh(config.mesh, jax.devices()[:4]))
    cache = jax.config.jax_compilation_cache_dir
    text = json.dumps(fields.to_json(config))
    outputs = run_processes(SCRIPT, text, str(tmp_path / "two"), cache)
    assert all("done 5" in output for output in outputs)
    # Process 0 alone speaks and writes.
    assert "step 5/5" in outputs[0]
    assert "step " not in outputs[1]
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in two] == [0, 1, 2, 3, 4, 5]
    for name in ("loss", "grad_norm", "tokens"):
        series = [[line[name] for line in run[1:]] for run in (two, one)]
        assert max_relative(*series) < 1e-5, name
    assert abs(two[5]["eval_loss"] / one[5]["eval_loss"] - 1) < 1e-5
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("one", "two")]
    assert names[0] == names[1]
    assert {path.name for path in (tmp_path / "two/checkpoints").iterdir()} == {
        "00000003",
        "00000005",
    }
    # One process goes on with what two have saved.
    further = make_mesh(MeshConfig(tensor=2), jax.devices()[:2])
    state = train(config, tmp_path / "two", further)
    assert int(state.step) == 5
