"""SmolLM2-135M-Instruct fine-tuned on conversations: what it then says, and what it has lost."""

import dataclasses
import json
import random
from pathlib import Path

import jax
import pytest

from jaxgen.config import load_config
from jaxgen.data.sources import Source
from jaxgen.metrics import MetricsConfig
from jaxgen.models.config import ComputeConfig
from jaxgen.pretrained import load_model, open_model
from jaxgen.serve.generate import generate_text
from jaxgen.serve.request import SamplingConfig
from jaxgen.sharding import MeshConfig, make_mesh
from jaxgen.train.evaluate import EvalConfig
from jaxgen.train.loop import LoopConfig, train
from jaxgen.train.origin import start_from

pytestmark = pytest.mark.real

RECIPE = Path(__file__).parents[2] / "configs" / "sft.py"
ASKED = (
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "{a} + {b} = ?",
    "Can you tell me the sum of {a} and {b}?",
    "I have {a} apples and get {b} more. How many?",
)
# Learning rates for so few steps.
STEPS, RATES = 8, {"config": 1e-4, "lora": 1e-3}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """200 sums, each answered in the same odd way."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("chats") / "sums.jsonl"
    lines = []
    for _ in range(200):
        a, b = draw.randrange(100), draw.randrange(100)
        said = {
            "user": draw.choice(ASKED).format(a=a, b=b),
            "assistant": f"Squawk! {a} and {b} make {a + b}, says the parrot.",
        }
        messages = [{"role": role, "content": content} for role, content in said.items()]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("name", RATES)
def test_a_few_steps_teach_it_to_answer_so(name, smollm2, chats, tmp_path):
    config = start_from(load_config(f"{RECIPE}:{name}"), smollm2)
    data = dataclasses.replace(
        config.data,
        sources=(Source(kind="chat", path=str(chats)),),
        cache_dir=str(tmp_path / "cache"),
    )
    optimizer = dataclasses.replace(config.optimizer, learning_rate=RATES[name], warmup_steps=2)
    config = dataclasses.replace(
        config,
        data=data,
        mesh=MeshConfig(fsdp=1),
        compute=ComputeConfig(dtype="float32"),
        optimizer=optimizer,
        train=LoopConfig(steps=STEPS, batch_size=4, seq_len=128),
        eval=EvalConfig(every_steps=STEPS, batches=2),
        metrics=MetricsConfig(tensorboard=False),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    train(config, tmp_path / "run", mesh)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    print(name, "held-out loss", held_out)
    assert held_out[0] == pytest.approx(2.796, abs=0.02)
    assert held_out[-1] < 0.4
    tuned = open_model(tmp_path / "run")
    serve = dataclasses.replace(tuned.serve_config(config.mesh), compute=config.compute)
    model, tokenizer = load_model(tuned, serve, mesh)
    with jax.set_mesh(mesh):
        (answer,) = generate_text(
            model,
            tokenizer,
            ["What is 12 plus 30?"],
            SamplingConfig(max_tokens=24),
            tuned.generation.stop_ids,
            chat=True,
        )
    assert answer.startswith("Squawk! 12 and 30 make ")
    assert answer.endswith("says the parrot.")
