"""The notebooks, executed as a user's would be: a fresh kernel, every cell, in order."""

import os
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def outputs(notebook, cell_id):
    """What a cell printed, and what it displayed by kind."""
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    text = "".join(out.text for out in cell.outputs if out.output_type == "stream")
    return text, {k: v for out in cell.outputs for k, v in out.get("data", {}).items()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_outputs_are_stored(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart after a run with a small model on a few files, on eight simulated devices."""
    folder = tmp_path_factory.mktemp("colab")
    (folder / "texts").mkdir()
    for number in range(60):
        text = f"def number_{number}():\n    return {number} + {number % 7}\n" * 20
        (folder / "texts" / f"{number}.txt").write_text(text)
    notebook = nbformat.read(ROOT / "colab" / "quickstart.ipynb", as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    parameters.source += f"""
TEXT = {str(folder / "texts" / "*.txt")!r}
STEPS, NUM_LAYERS, EMBED_DIM = 6, 2, 32
"""
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
    }
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environ)
    return notebook, folder


def test_quickstart_trains_on_a_mesh_and_plots_the_loss(quickstart):
    notebook, folder = quickstart
    assert "8 x cpu" in outputs(notebook, "devices")[0]
    assert "'fsdp': 4" in outputs(notebook, "config")[0]
    assert "step 6/6" in outputs(notebook, "train")[0]
    assert (folder / "runs" / "quickstart" / "metrics.jsonl").read_text().count("\n") == 7
    assert "image/png" in outputs(notebook, "loss")[1]


def test_quickstart_shows_the_sharding_and_generates(quickstart):
    notebook, _ = quickstart
    table, shown = outputs(notebook, "sharding")
    embedding = next(line.split() for line in table.splitlines() if line.startswith("embedding"))
    assert " ".join(embedding[1:5]) == "(4096, 32) (2048, 8)"
    assert all(f"CPU {number}" in shown["text/html"] for number in range(8))
    texts, _ = outputs(notebook, "generate")
    for prompt in ("def main(", "import ", "class "):
        assert prompt in texts


def test_no_cell_writes_to_stderr(quickstart):
    """Warnings are what a user would see first."""
    notebook, _ = quickstart
    for cell in notebook.cells:
        for out in cell.get("outputs", ()):
            if out.output_type == "stream" and out.name == "stderr":
                assert all(line.startswith("data: ") for line in out.text.splitlines()), out.text
