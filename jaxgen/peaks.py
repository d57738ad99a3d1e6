"""What devices can do at most: FLOPs a second, and bytes of their memory a second."""

from typing import Any, NamedTuple


class Peak(NamedTuple):
    """Of one JAX device, which on TPU v2, v3 and 7x is half a chip."""

    flops: float
    """Dense bf16 FLOPs a second."""
    bytes_per_s: float
    """Of the memory that holds weights."""


# Source: cloud.google.com/tpu/docs (system architecture); NVIDIA's data sheets, without sparsity.
# Of two sizes of memory, the name that drivers give tells which; A100 alone has 40 GB.
_PEAKS = {
    "TPU v2": Peak(22.5e12, 350e9),
    "TPU v3": Peak(61.5e12, 450e9),
    "TPU v4": Peak(275e12, 1200e9),
    "TPU v5 lite": Peak(197e12, 819e9),
    "TPU v5e": Peak(197e12, 819e9),
    "TPU v5": Peak(459e12, 2765e9),
    "TPU v5p": Peak(459e12, 2765e9),
    "TPU v6 lite": Peak(918e12, 1640e9),
    "TPU v6e": Peak(918e12, 1640e9),
    "TPU7x": Peak(1153.5e12, 3690e9),
    "A10G": Peak(70e12, 600e9),
    "A100": Peak(312e12, 1555e9),
    "A100 80GB": Peak(312e12, 2039e9),
    "A100 80GB PCIe": Peak(312e12, 1935e9),
    "A40": Peak(149.7e12, 696e9),
    "L4": Peak(121e12, 300e9),
    "L40S": Peak(362e12, 864e9),
    "H100 PCIe": Peak(756e12, 2000e9),
    "H100 NVL": Peak(835e12, 3900e9),
    "H100": Peak(989e12, 3350e9),
    "H200": Peak(989e12, 4800e9),
    "GH200": Peak(989e12, 4000e9),
    "GH200 144G": Peak(989e12, 4900e9),
    "B200": Peak(2250e12, 8000e9),
    "GB200": Peak(2500e12, 8000e9),
}


def peak(device: Any) -> Peak | None:
    """Returns what a JAX device can do at most, or None where we do not know, as of a CPU."""
    kind = device.device_kind
    if kind.startswith("TPU"):
        return _PEAKS.get(kind)
    if device.platform not in ("gpu", "cuda"):
        return None
    # "NVIDIA H100 80GB HBM3": every word of the name, the longest name first.
    words = set(kind.replace("-", " ").split())
    for name in sorted(_PEAKS, key=len, reverse=True):
        if set(name.split()) <= words:
            return _PEAKS[name]
    return None
