"""Attention of new tokens to keys and values in pages: what holds them is what reads them.

- `GatherPages` are gathered and multiplied, on every platform: the reference for the others. Tokens
  may be split over devices, and be int8.
- `TritonPages` are the same, read once, straight from where they lie, by a kernel for GPUs.
- `RaggedPages` are read so by JAX's Pallas kernel for TPUs.

B rows, T new tokens, P pages of a row, N heads, K kv heads, H head dim.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.errors import UserError
from jaxgen.nn import paged_gather, paged_ragged, paged_triton
from jaxgen.nn.attention import heads_like, mesh_device, num_shards
from jaxgen.nn.paged_gather import SCALE_BYTES, GatherPages
from jaxgen.nn.paged_ragged import RaggedPages
from jaxgen.nn.paged_triton import TritonPages
from jaxgen.sharding import Rules, logical_to_mesh

PagedBackend = Literal["auto", "gather", "ragged", "triton"]
KERNELS: dict[str, PagedBackend] = {"tpu": "ragged", "gpu": "triton", "cuda": "triton"}
LayerPages = GatherPages | RaggedPages


def token_axes(rules: Rules) -> tuple[str, ...]:
    """Returns the mesh axes that split neither rows nor heads: those that split cached tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    taken = logical_to_mesh(rules.batch) + logical_to_mesh(rules.heads)
    return tuple(axis for axis, size in mesh.shape.items() if size > 1 and axis not in taken)


def empty_pages(
    rules: Rules,
    pages: int,
    size: int,
    heads: tuple[int, int, int],
    dtype: jnp.dtype,
    *,
    backend: PagedBackend = "auto",
    int8: bool = False,
) -> LayerPages:
    """Returns one layer's pages of zeros, split over the mesh axes of rows, tokens and heads.

    Every device has pages of its own, counted from 0, for its rows and kv heads; page 0 belongs to
    nobody. Page b of a row is on all C devices of `token_axes`: device c has tokens
    `(b * C + c) * size` and the following of it.

    Args:
        rules: how rows and heads are split.
        pages: of each shard of rows.
        size: tokens of a page on each device.
        heads: numbers of query heads and of kv heads, and head_dim.
        dtype: of queries, and of keys and values unless they are int8.
        backend: `auto` is the platform's kernel where it can be, and otherwise `gather`.
        int8: whether keys and values are, with a scale for each token and kv head.

    Raises:
        UserError: a kernel, asked for by name, cannot read such pages.
    """
    # Where query heads are split otherwise than kv heads, each has a copy of its kv head.
    num_heads, num_kv_heads, head_dim = heads
    kept = num_kv_heads if rules.kv_heads == rules.heads else num_heads
    rows, split, tokens = *map(logical_to_mesh, (rules.batch, rules.heads)), token_axes(rules)
    device, kept_here = mesh_device(), kept // num_shards(split)
    refused = {
        "ragged": paged_ragged.refuses(
            device, kept_here, head_dim, dtype, num_shards(tokens), int8=int8
        ),
        "triton": paged_triton.refuses(
            device, head_dim, pages * size * kept_here * (head_dim + SCALE_BYTES * int8)
        ),
        "gather": None,
    }
    if backend == "auto":
        kernel = KERNELS.get(device.platform, "gather")
        backend = "gather" if refused[kernel] else kernel
    elif reason := refused[backend]:
        raise UserError(f"attention {backend!r} {reason}; use 'auto' or 'gather'")
    if backend == "ragged":
        return RaggedPages.empty(num_shards(rows) * pages, size, kept, head_dim, dtype, rows, split)
    kind = TritonPages if backend == "triton" else GatherPages
    lines = num_shards(rows + tokens) * pages * kept
    return kind.empty(lines, rows + tokens + split, size, head_dim, dtype, int8=int8)


def attend_paged(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pages: LayerPages,
    table: Int[Array, "B P"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], LayerPages]:
    """Writes k and v into the rows' pages, and attends from q to the tokens up to its own.

    Of a row, the token at position p is in page `table[p // page size]`, where a page has its
    tokens on all devices of `token_axes`. The softmax is fp32 and products accumulate in fp32, as
    in `attend`. Every device works on its own rows, heads and tokens; what those of other tokens
    found is all that it is told. What a row gets does not depend on how long the others are: what
    lies past its end adds zeros.

    Args:
        q: queries.
        k: keys of the same tokens, after RoPE.
        v: their values.
        pages: written in place.
        table: each row's pages; 0 where it has none yet.
        positions: in its sequence, of each token; they go up by one.
        segments: 0 for padding, which follows a row's tokens, is written to page 0 and gets
            something finite.
        window: tokens seen, the query's own included; None for all before it.
        soft_cap: scores s become soft_cap * tanh(s / soft_cap).
        scale: factor on scores; None for H ** -0.5.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    who: dict[str, Any] = {"window": window, "soft_cap": soft_cap, "scale": scale}
    args = (q, heads_like(q, k), heads_like(q, v), pages, table, positions, segments)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, args)
    varying = sum(map(logical_to_mesh, specs[0]), ())
    if isinstance(pages, GatherPages):
        who["split"] = tuple(axis for axis in logical_to_mesh(specs[3].k[0]) if axis not in varying)
    if isinstance(pages, RaggedPages):
        device = functools.partial(paged_ragged.attend, **who)
    elif isinstance(pages, TritonPages):
        device = functools.partial(paged_triton.attend, **who)
    else:
        device = functools.partial(paged_gather.attend, **who, varying=varying)
    # A kernel's outputs do not say over which axes they vary.
    outs, checked = (specs[0], specs[3]), type(pages) is GatherPages
    return jax.shard_map(device, in_specs=specs, out_specs=outs, check_vma=checked)(*args)
