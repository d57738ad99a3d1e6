"""The notebooks, executed as a user's would be: a fresh kernel, every cell, in order."""

import os
import re
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


def execute(name, folder, parameters):
    """The notebook after a run in `folder`, on eight simulated devices."""
    notebook = nbformat.read(ROOT / "colab" / name, as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    cell.source += f"\n{parameters}\n"
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        # Faster to compile, and the same collectives.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environ)
    return notebook


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart after a run with a small model on a few files."""
    folder = tmp_path_factory.mktemp("colab")
    (folder / "texts").mkdir()
    for number in range(60):
        text = f"def number_{number}():\n    return {number} + {number % 7}\n" * 20
        (folder / "texts" / f"{number}.txt").write_text(text)
    text = str(folder / "texts" / "*.txt")
    parameters = f"TEXT = {text!r}\nSTEPS, NUM_LAYERS, EMBED_DIM = 6, 2, 32"
    return execute("quickstart.ipynb", folder, parameters), folder


@pytest.fixture(scope="module")
def parallelism(tmp_path_factory):
    return execute("parallelism.ipynb", tmp_path_factory.mktemp("colab"), "STEPS = 3")


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


@pytest.mark.full
@pytest.mark.parametrize(
    ("cell", "needed"),
    [
        ("data", "all-reduce"),
        ("fsdp", "all-gather"),
        ("tensor", "all-gather"),
        ("context", "collective-permute"),
        ("pipeline", "collective-permute"),
        ("expert", "all-gather"),
    ],
)
def test_each_axis_has_its_picture_its_loss_and_its_traffic(parallelism, cell, needed):
    """That the losses are equal is what the notebook itself asserts."""
    text, shown = outputs(parallelism, cell)
    assert f"{cell}=8" in shown["image/svg+xml"]
    alone, eight = (
        [float(number) for number in line.split()[2:]]
        for line in text.splitlines()
        if line.startswith(("one device", "8 devices"))
    )
    assert len(alone) == len(eight) == 3
    assert eight == pytest.approx(alone, rel=1e-4)
    sent = re.findall(r"([\d.]+) kB over (.+): (\S+)", text)
    assert all(float(size) > 0 and axes == cell for size, axes, _ in sent)
    # Which sums and gathers one compiler makes of the others is its own affair.
    kinds = {kind for _, _, kind in sent}
    assert needed in kinds
    assert ("collective-permute" in kinds) == (needed == "collective-permute")
    assert cell != "data" or kinds == {"all-reduce"}


@pytest.mark.full
def test_a_hybrid_sends_over_each_of_its_axes(parallelism):
    text, shown = outputs(parallelism, "hybrid")
    assert "data=2 fsdp=2 tensor=2" in shown["image/svg+xml"]
    for axis in ("data", "fsdp", "tensor"):
        assert re.search(rf"kB over {axis}: ", text)


@pytest.mark.parametrize(
    "name", ["quickstart", pytest.param("parallelism", marks=pytest.mark.full)]
)
def test_no_cell_writes_to_stderr(name, request):
    """Warnings are what a user would see first."""
    ran = request.getfixturevalue(name)
    for cell in (ran if name == "parallelism" else ran[0]).cells:
        for out in cell.get("outputs", ()):
            if out.output_type == "stream" and out.name == "stderr":
                assert all(line.startswith("data: ") for line in out.text.splitlines()), out.text
