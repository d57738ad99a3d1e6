"""Losses of ten steps on one device, as they were when they were last looked at.

If a change of them is meant, write them anew and say why in the commit:

    python tests/train/test_golden.py
"""

import json
from pathlib import Path

import jax
import pytest
from small_runs import GEMMA, LLAMA, config_of, max_relative, program

GOLDEN = Path(__file__).parent.parent / "golden" / "losses.json"
MODELS = {"llama": LLAMA, "gemma": GEMMA}


def series(model):
    _, metrics = program(config_of(MODELS[model])).run(10)
    return {name: metrics[name].tolist() for name in ("loss", "grad_norm", "learning_rate")}


@pytest.mark.smoke
@pytest.mark.parametrize("model", MODELS)
def test_ten_steps_have_the_golden_losses(model):
    golden = json.loads(GOLDEN.read_text())[model]
    for name, values in series(model).items():
        assert max_relative(values, golden[name]) < 1e-5, name


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    GOLDEN.write_text(json.dumps({model: series(model) for model in MODELS}, indent=2) + "\n")
