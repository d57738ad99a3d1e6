"""Times one layer's attention to keys and values in pages, by each backend of this device.

    python benchmarks/paged_attention.py

Rows of the shape of Llama 3.1 8B (32 heads, 8 kv heads of 128, bf16, pages of 16 tokens), each as
long as the first column says, one new token a row, or one row with a prompt's chunk. Prints the
relative error against `attend` in fp32 over whole rows, the median time of a call, and the share of
the memory's peak that reading each key and value once in that time would be.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.nn.attention import attend
from jaxgen.nn.paged import attend_paged, empty_pages
from jaxgen.peaks import peak
from jaxgen.sharding import MeshConfig, Rules, make_mesh

HEADS, KV_HEADS, WIDTH, PAGE = 32, 8, 128, 16
# Rows, tokens of each that are kept, and new ones.
SHAPES = [(1, 4096, 1), (8, 4096, 1), (32, 1024, 1), (32, 4096, 1), (64, 4096, 1), (1, 4096, 256)]
BACKENDS = [("gather", False), ("gather", True), ("triton", False), ("triton", True)]
# Calls that are timed as one, each on what the one before it wrote, so that none is waited for.
CALLS = 20


def inputs(rows: int, kept: int, new: int):
    """Random queries, keys and values of whole rows, their pages in any order, and positions."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(rows, new, HEADS, WIDTH), *[(rows, kept + new, KV_HEADS, WIDTH)] * 2]
    q, k, v = (jax.random.normal(*pair, jnp.bfloat16) for pair in zip(keys, shapes, strict=True))
    width = -(-(kept + new) // PAGE)
    order = np.random.default_rng(0).permutation(rows * width) + 1
    table = jnp.asarray(order.reshape(rows, width), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(kept + new, dtype=jnp.int32), (rows, kept + new))
    return q, k, v, table, positions


def run(backend: str, int8: bool, rows: int, kept: int, new: int) -> tuple[float, float]:
    """Returns the relative error and the seconds of a call."""
    q, k, v, table, positions = inputs(rows, kept, new)
    heads, dtype = (HEADS, KV_HEADS, WIDTH), jnp.dtype("bfloat16")
    pages = empty_pages(
        Rules().here(), 1 + table.size, PAGE, heads, dtype, backend=backend, int8=int8
    )

    @functools.partial(jax.jit, donate_argnames="pages")
    def part(q, k, v, pages, table, positions):
        ones = jnp.ones_like(positions)
        return attend_paged(q, k, v, pages, table, positions=positions, segments=ones)

    nobody = jnp.zeros((rows, kept, HEADS, WIDTH), dtype)
    _, pages = part(nobody, k[:, :kept], v[:, :kept], pages, table, positions[:, :kept])
    spans = positions[:, kept:]
    read = functools.partial(part, q, k[:, kept:], v[:, kept:], table=table, positions=spans)
    out, pages = read(pages=pages)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(CALLS):
            last, pages = read(pages=pages)
        jax.block_until_ready(last)
        times.append((time.perf_counter() - begin) / CALLS)
    whole = attend(
        *(x.astype(jnp.float32) for x in (q, k, v)),
        q_positions=spans,
        kv_positions=positions,
        backend="xla",
    )
    error = jnp.linalg.norm(out.astype(jnp.float32) - whole) / jnp.linalg.norm(whole)
    return float(error), statistics.median(times)


def main() -> None:
    device = jax.devices()[0]
    known = peak(device)
    print(f"{device.device_kind}, jax {jax.__version__}")
    print(
        f"{'tokens':>7} {'rows':>5} {'new':>4}  {'backend':14} {'error':>7} {'us':>9} {'peak':>5}"
    )
    for rows, kept, new in SHAPES:
        for backend, int8 in BACKENDS:
            name = backend + ", int8" * int8
            try:
                with jax.set_mesh(make_mesh(MeshConfig(), [device])):
                    error, seconds = run(backend, int8, rows, kept, new)
            except UserError as refusal:
                print(f"{kept:7} {rows:5} {new:4}  {name:14} {refusal}")
                continue
            moved = 2 * rows * (kept + new) * KV_HEADS * (WIDTH + 4 if int8 else 2 * WIDTH)
            share = f"{moved / seconds / known.bytes_per_s:5.0%}" if known else "    -"
            print(f"{kept:7} {rows:5} {new:4}  {name:14} {error:7.0e} {seconds * 1e6:9.0f} {share}")


if __name__ == "__main__":
    main()
