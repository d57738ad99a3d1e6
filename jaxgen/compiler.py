"""Compiler options by kind of device, as data, and the cache of compiled programs."""

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

# Gathers of FSDP weights otherwise become windowed einsums, a product and a permute for each hop:
# 1.4 to 2.3 times slower by libtpu's own cycle counts.
NO_WINDOWED_EINSUM = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

# Gradient reductions run beside the backward products, one array at a time, where the default is
# one synchronous reduction of several. The 8B step on v5e:4x4: 73% of the bytes that its layers
# reduce are hidden instead of none, libtpu's cycles fall from 2.57 to 2.42 G, the peak from 12.2 to
# 10.9 GiB (libtpu 0.0.52). v5e only: libtpu refuses such fusions on v5p as unsupported.
ASYNC_ALL_REDUCE = {
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_jf_crs_combiner_threshold_in_bytes": "0",
}

TPU_OPTIONS: dict[str, dict[str, str]] = {
    "TPU v5 lite": NO_WINDOWED_EINSUM | ASYNC_ALL_REDUCE,
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
    told = jax.config.values.get("jax_compilation_cache_dir")
    directory = directory or told or str(default)
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory
