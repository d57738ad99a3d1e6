"""Families: their tables and options give what transformers computed; config.json both ways."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_families import CASES, NUM_NEW, PROMPT_LEN, computed, config_json

from jaxgen.formats.families import FAMILIES, family_for, family_of

GOLDEN = Path(__file__).parent.parent / "golden" / "families"


@pytest.mark.parametrize("case", CASES)
def test_a_tiny_model_computes_what_transformers_did(case):
    """Values of transformers 5.24: python tests/formats/test_families_parity.py writes them anew.

    Its greedy text is the first row: each of our logits is largest at the next token.
    """
    golden = json.loads((GOLDEN / f"{case}.json").read_text())
    logits, loss, gradients = computed(case, golden["greedy"])
    for position, values in golden["logits"].items():
        np.testing.assert_allclose(logits[1, int(position), : len(values)], values, atol=1e-4)
    text = logits[0, PROMPT_LEN - 1 :][:NUM_NEW].argmax(axis=-1)
    assert text.tolist() == golden["greedy"]
    assert loss == pytest.approx(golden["loss"], rel=1e-5)
    norms = {name: float(np.linalg.norm(gradient)) for name, gradient in gradients.items()}
    assert norms == pytest.approx(golden["gradients"], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_config_is_written_as_it_is_read(case):
    given = config_json(case)
    config = family_of(given).read(given)
    family, written = family_for(config)
    assert family.architecture == given["architectures"][0]
    assert family.read(written) == config


def test_every_family_has_a_tiny_model():
    assert {family_of(config_json(case)).architecture for case in CASES} == {
        family.architecture for family in FAMILIES
    }
