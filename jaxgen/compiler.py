"""Compiler options by kind of device, as data, and the cache of compiled programs."""

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

# Without it, gathers of FSDP weights become windowed einsums (a product a hop, behind a permute
# each): 1.4 to 2.3 times slower by libtpu's own cycle counts.
NO_WINDOWED_EINSUM = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

TPU_OPTIONS: dict[str, dict[str, str]] = {
    "TPU v5 lite": NO_WINDOWED_EINSUM,
    "TPU v5": NO_WINDOWED_EINSUM,
    "TPU v6 lite": NO_WINDOWED_EINSUM,
    "TPU7x": NO_WINDOWED_EINSUM,
}


def compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Returns what to give as `lowered.compile(compiler_options=...)` for programs on this mesh."""
    device = (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).abstract_device
    if device is None or device.platform != "tpu":
        return {}
    return TPU_OPTIONS.get(device.device_kind, NO_WINDOWED_EINSUM)


def enable_compilation_cache(directory: str | None = None) -> str:
    """Keeps compiled programs between processes, and returns where.

    The directory is `directory`, or what JAX has been told (JAX_COMPILATION_CACHE_DIR), or
    `jaxgen/xla` in the user's cache directory (XDG_CACHE_HOME, ~/.cache). Programs of any size and
    compile time are kept: a run starts many small ones.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxgen" / "xla"
    directory = directory or jax.config.jax_compilation_cache_dir or str(default)
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory
