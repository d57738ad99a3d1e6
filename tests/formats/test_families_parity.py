"""Every family beside transformers, in fp32 on CPU: logits, loss, gradients, greedy text."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import (
    CASES,
    NUM_NEW,
    PROMPT_LEN,
    config_json,
    decoder_of,
    from_theirs,
    rows,
    tensors_of,
)

from jaxgen.checkpoint.tree import named_leaves
from jaxgen.formats.families import family_of
from jaxgen.serve.generate import Generator
from jaxgen.serve.sampler import SamplingConfig
from jaxgen.sharding import MeshConfig, make_mesh

GOLDEN = Path(__file__).parent.parent / "golden" / "families"
pytestmark = pytest.mark.parity


def theirs(case, folder):
    """What transformers computes from the files: tokens, logits, loss, gradients by our names."""
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    given = config_json(case)
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
    tokens = rows(greedy[0, PROMPT_LEN:].numpy())
    ids = torch.from_numpy(tokens).long()
    found = model(ids, labels=ids)
    found.loss.backward()
    model.config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return tokens, found.logits.detach().numpy(), found.loss.item(), gradients, saved
