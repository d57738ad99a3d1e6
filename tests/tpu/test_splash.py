"""The splash kernel compiles, forward and backward, for every chip we have block sizes for."""

import pytest
from gradients import compile_gradients

from jaxgen.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.tpu_compile

CASES = [
    ("v5e:2x2", "TPU v5 lite", 128, 4096, None),
    pytest.param("v5p:2x2x1", "TPU v5", 128, 4096, None, marks=pytest.mark.full),
    pytest.param("v6e:2x2", "TPU v6 lite", 128, 4096, None, marks=pytest.mark.full),
    ("v5e:2x2", "TPU v5 lite", 64, 300, 100),
    pytest.param("v5e:2x2", "TPU v5 lite", 256, 8192, 1024, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("topology", "kind", "head_dim", "seq_len", "window"), CASES)
def test_compiles(topology, kind, head_dim, seq_len, window, describe):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices=describe(topology))
    assert mesh.abstract_mesh.abstract_device.device_kind == kind

    compiled = compile_gradients(
        mesh,
        2,
        seq_len,
        (8, 4),
        head_dim,
        ("fsdp", None, "tensor"),
        window=window,
        soft_cap=50.0 if window else None,
    )
    text = compiled.as_text()
    assert "splash_mha_fwd_segmented" in text
    assert "splash_mha_dkv_segmented" in text
    # Never a score for every query and key.
    assert f"{seq_len},{seq_len}]" not in text
