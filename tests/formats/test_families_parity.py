"""Every family beside transformers, in fp32 on CPU: logits, loss, gradients, greedy text."""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_families import (
    CASES,
    NUM_NEW,
    PROMPT_LEN,
    abstract_decoder,
    computed,
    config_json,
    decoder_of,
    from_theirs,
    rows,
    tensors_of,
)

from jaxgen.formats.families import family_for, family_of
from jaxgen.serve.generate import Generator
from jaxgen.serve.request import SamplingConfig
from jaxgen.sharding import MeshConfig, make_mesh

GOLDEN = Path(__file__).parent.parent / "golden" / "families"
pytestmark = pytest.mark.parity


def transformers_on(case, folder, given):
    """What transformers computes from a config.json and our random tensors, written to a folder.

    Returns the greedy text, the logits and loss of `rows`, the gradients by our names, and the
    config.json that it writes itself.
    """
    import torch
    from safetensors.numpy import load_file, save_file
    from transformers import AutoModelForCausalLM

    family = family_of(given)
    config = family.read(given)
    (folder / "config.json").write_text(json.dumps(given))
    save_file(tensors_of(family, config), folder / "model.safetensors", {"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    model.generation_config.eos_token_id = None
    prompt = torch.from_numpy(rows(0)[:1, :PROMPT_LEN]).long()
    greedy = model.generate(prompt, do_sample=False, max_new_tokens=NUM_NEW, pad_token_id=0)
    greedy = greedy[0, PROMPT_LEN:].tolist()
    ids = torch.from_numpy(rows(greedy)).long()
    found = model(ids, labels=ids)
    found.loss.backward()
    # Saved like weights, gradients get the names that files have.
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(folder / "saved")
    gradients = load_file(folder / "saved" / "model.safetensors")
    gradients = from_theirs(family, abstract_decoder(config), gradients)
    saved = json.loads((folder / "saved" / "config.json").read_text())
    return greedy, found.logits.detach().numpy(), found.loss.item(), gradients, saved


@pytest.mark.parametrize("case", CASES)
def test_a_tiny_model_computes_what_transformers_does(case, tmp_path, record_property):
    given = config_json(case)
    config = family_of(given).read(given)
    family, written = family_for(config)
    greedy, logits, loss, gradients, saved = transformers_on(case, tmp_path, written)
    assert family.read(saved) == config
    our_logits, our_loss, our_gradients = computed(case, greedy)
    errors = {
        name: np.linalg.norm(our_gradients[name] - gradient) / np.linalg.norm(gradient)
        for name, gradient in gradients.items()
    }
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        prompt = rows(greedy)[0, :PROMPT_LEN].tolist()
        (text,) = Generator(decoder_of(case))([prompt], SamplingConfig(max_tokens=NUM_NEW))
    logit_error, loss_error = np.abs(our_logits - logits).max(), abs(our_loss - loss) / loss
    print(f"{case}: logits {logit_error:.1e} loss {loss_error:.1e}", end=" ")
    print(f"gradients {max(errors.values()):.1e}")
    assert logit_error < 1e-4
    assert loss_error < 1e-4
    assert max(errors.values()) < 1e-4, errors
    assert text == greedy


def write_golden(case):
    with tempfile.TemporaryDirectory() as folder:
        greedy, logits, loss, gradients, _ = transformers_on(case, Path(folder), config_json(case))
    golden = {
        "greedy": greedy,
        "loss": loss,
        "logits": {
            str(position): [round(float(value), 6) for value in logits[1, position, :8]]
            for position in (0, 7, 8, 31, 71)
        },
        "gradients": {
            name: float(np.linalg.norm(gradient)) for name, gradient in sorted(gradients.items())
        },
    }
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{case}.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        write_golden(case)
