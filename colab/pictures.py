"""Draws the meshes in colab/pictures: `python colab/pictures.py`."""

from pathlib import Path

from jax.sharding import AbstractMesh, AxisType

import jaxgen
from jaxgen.sharding import AXES

MESHES = [
    *({axis: 8} for axis in AXES),
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"fsdp": 2, "pipeline": 2, "tensor": 2},
]


def pictures() -> dict[str, str]:
    """Returns the name and the text of each file."""
    drawn = {}
    for sizes in MESHES:
        every = tuple(sizes.get(axis, 1) for axis in AXES)
        mesh = AbstractMesh(every, AXES, (AxisType.Explicit,) * len(AXES))
        drawn[f"{'-'.join(sizes)}.svg"] = jaxgen.draw_mesh(mesh)
    return drawn


if __name__ == "__main__":
    folder = Path(__file__).parent / "pictures"
    folder.mkdir(exist_ok=True)
    for name, svg in pictures().items():
        (folder / name).write_text(svg, encoding="utf-8")
