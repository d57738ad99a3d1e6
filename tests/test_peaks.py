"""Which device is known by which name."""

import types

import pytest

from jaxgen.peaks import peak


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("kind", "platform", "expected"),
    [
        ("TPU v4", "tpu", (275e12, 1200e9)),
        ("TPU v5 lite", "tpu", (197e12, 819e9)),
        ("TPU v5", "tpu", (459e12, 2765e9)),
        ("TPU v6 lite", "tpu", (918e12, 1640e9)),
        ("TPU7x", "tpu", (2307e12 / 2, 7380e9 / 2)),
        ("NVIDIA H100 80GB HBM3", "gpu", (989e12, 3350e9)),
        ("NVIDIA H100 PCIe", "gpu", (756e12, 2000e9)),
        ("NVIDIA H200", "gpu", (989e12, 4800e9)),
        ("NVIDIA A100-SXM4-40GB", "gpu", (312e12, 1555e9)),
        ("NVIDIA A100-SXM4-80GB", "gpu", (312e12, 2039e9)),
        ("NVIDIA A100 80GB PCIe", "gpu", (312e12, 1935e9)),
        ("NVIDIA L40S", "gpu", (362e12, 864e9)),
        ("NVIDIA GeForce", "gpu", None),
        ("TPU v99", "tpu", None),
        ("cpu", "cpu", None),
    ],
)
def test_peaks(kind, platform, expected):
    assert peak(types.SimpleNamespace(device_kind=kind, platform=platform)) == expected
