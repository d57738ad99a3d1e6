"""How much of the host's memory reading and writing a folder takes, beside the model itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_folders import LLAMA

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.formats import safetensors
from jaxgen.formats.safetensors import Spec

ROOT = Path(__file__).parents[2]
HALF = np.dtype(jnp.bfloat16)
# Tables of 128 MB and products of 64 MB, six in a stack; 0.9 GB in all.
SMALL = LLAMA | {
    "vocab_size": 65_536,
    "num_hidden_layers": 6,
    "hidden_size": 1024,
    "intermediate_size": 16_384,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
LLAMA_3_1_8B = LLAMA | {
    "vocab_size": 128_256,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8192,
}
# Prints bytes: of the model, and of what the process held beside it, reading and writing.
SCRIPT = """
import gc, sys, time
import jax, jaxgen
from jaxgen.pretrained import abstract_model

def held(name):
    with open("/proc/self/status") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields[name].split()[0]) * 1024

# Whatever else runs on this machine is worth more.
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
jaxgen.simulate_devices(8)
pretrained = jaxgen.open_model(sys.argv[1])
config = pretrained.serve_config()
mesh = jaxgen.make_mesh(config.mesh)
assert mesh.shape["fsdp"] == 8
target = abstract_model(config, mesh, pretrained.dtype)
pretrained.stored
jax.block_until_ready(jax.numpy.ones(1) + 1)  # Now the compiler is in memory too.
gc.collect()
before, start = held("VmRSS"), time.monotonic()
model = pretrained.read(target)
size = 2 * config.model.num_params
print(size, held("VmHWM") - before - size, time.monotonic() - start)
if len(sys.argv) > 2:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Forgets the peak.
    before, start = held("VmRSS"), time.monotonic()
    pretrained.write(sys.argv[2], model)
    print(size, held("VmHWM") - before, time.monotonic() - start)
"""


def shapes_of(given):
    D, F, V = given["hidden_size"], given["intermediate_size"], given["vocab_size"]
    N, K = (given[f"num_{name}_heads"] * given["head_dim"] for name in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D)}
    shapes["model.norm.weight"] = (D,)
    for i in range(given["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (K, D) for n in "kv"}
        shapes |= {f"{layer}self_attn.q_proj.weight": (N, D)}
        shapes |= {f"{layer}self_attn.o_proj.weight": (D, N)}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (F, D) for n in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (D, F)}
    return shapes


def write_large(folder, given):
    """A folder of random weights in bfloat16: one random block, again and again."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(given))
    Tokenizer.from_bytes().save(str(folder))
    specs = {name: Spec(HALF, shape) for name, shape in shapes_of(given).items()}
    block = np.random.default_rng(0).normal(0, 0.02, 4 << 20).astype(HALF).tobytes()

    def write(file, tensor):
        for start in range(0, specs[tensor].nbytes, len(block)):
            file.write(block[: specs[tensor].nbytes - start])

    safetensors.write_files(str(folder), specs, write)
    return safetensors.split(specs, safetensors.MAX_FILE_BYTES)


def measure(*folders):
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folders)],
        capture_output=True,
        text=True,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return [
        (int(size), int(beside)) for size, beside, _ in map(str.split, done.stdout.splitlines())
    ]


def allowed(given):
    """1.3 times the largest tensor, and the largest shard, of one parameter on one device."""
    D, F, V = given["hidden_size"], given["intermediate_size"], given["vocab_size"]
    shard = max(given["num_hidden_layers"] * D * F, V * D) * 2 // 8
    return 1.3 * max(V * D, D * F) * 2 + shard


def test_reading_and_writing_hold_one_tensor_and_one_shard_beside_the_model(tmp_path):
    write_large(tmp_path / "in", SMALL)
    (size, reading), (_, writing) = measure(tmp_path / "in", tmp_path / "out")
    # Where it is held twice, or a whole stack, it is far beyond.
    assert allowed(SMALL) < size / 4
    assert reading < allowed(SMALL)
    assert writing < allowed(SMALL)
    for name in (safetensors.WEIGHTS, "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).exists()
    shutil.rmtree(tmp_path)


@pytest.mark.full
def test_llama_8b_needs_little_beside_itself(tmp_path):
    """16 GB on the host, for devices are simulated, and on disk."""
    with open("/proc/meminfo") as file:
        available = int(dict(line.split(":") for line in file)["MemAvailable"].split()[0])
    if available < 17_000_000:
        pytest.skip(f"needs 17 GB of free memory, and there are {available / 1e6:.1f}")
    try:
        files = write_large(tmp_path / "in", LLAMA_3_1_8B)
        assert len(files) == 4
        ((size, reading),) = measure(tmp_path / "in")
        assert size == 2 * 8_030_261_248
        assert reading < allowed(LLAMA_3_1_8B)
    finally:
        shutil.rmtree(tmp_path)
