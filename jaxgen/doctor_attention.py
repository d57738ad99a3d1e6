"""Every attention backend against a reference in fp64: of training, and of decoding from pages.

B batch, T tokens, N heads, K kv heads, H head dim.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.nn.attention import attend
from jaxgen.nn.paged import attend_paged, empty_pages
from jaxgen.references import attention_reference
from jaxgen.sharding import MeshConfig, Rules, make_mesh
from jaxgen.verdict import WRONG, Section, judge, relative_error

# Norm of the difference over the norm. Measured on CPU at T=1024: 7e-7 in fp32, 4e-3 in bf16. A
# window that is one token short is 2e-2 off, or more.
ATTENTION_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# Of keys and values in int8, each off by half a 127th of the largest of its token and head.
INT8_TOLERANCE = 3e-2
# Tokens of a page.
PAGE = 16


def attention() -> Section:
    """Each attention backend, forward and backward, against a reference in fp64."""
    dtype, size = _shape(192)
    window = size["T"] // 4
    cases: dict[str, tuple[bool, dict[str, Any]]] = {
        "one document": (False, {}),
        "window": (False, {"window": window}),
        "packed": (True, {}),
        "packed, window, soft cap": (True, {"window": window, "soft_cap": 2.0}),
    }

    def check(backend: Any, given: list[Any], options: dict[str, Any]):
        call = _attention_call(backend, given, options)
        got = call()
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - begin)
        expected = attention_reference(*given, **options)
        errors = [relative_error(*pair) for pair in zip(got, expected, strict=True)]
        good = all(error <= ATTENTION_TOLERANCE[dtype] for error in errors)
        numbers = [f"{error:.0e}" for error in errors]
        numbers.append(f"{statistics.median(times) * 1e3:.2f}")
        return numbers, "ok" if good else f"{WRONG}: above {ATTENTION_TOLERANCE[dtype]:g}"

    def rows():
        for case, (packed, options) in cases.items():
            given = _attention_inputs(size, dtype, packed)
            for backend in ("xla", "splash", "cudnn", "triton"):
                yield backend, case, *judge(5, check, backend, given, options)

    shape = " ".join(f"{name}={number}" for name, number in size.items())
    return Section(
        f"attention: relative errors of the output and its gradients; {dtype} {shape}",
        ("backend", "rows", "out", "dq", "dk", "dv", "ms", ""),
        rows(),
    )


def decoding() -> Section:
    """Each way to read pages: rows are read up to their last token, and then that one."""
    dtype, size = _shape(80)
    cases: dict[str, tuple[bool, dict[str, Any]]] = {
        "one document": (False, {}),
        "window, soft cap": (False, {"window": size["T"] // 4, "soft_cap": 2.0}),
        "int8": (True, {}),
    }

    def check(backend: Any, int8: bool, options: dict[str, Any]):
        given = _attention_inputs(size, dtype, packed=False)
        with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
            got, seconds = _decode(backend, int8, given, options)
        error = relative_error(got, attention_reference(*given, **options)[0])
        most = INT8_TOLERANCE if int8 else ATTENTION_TOLERANCE[dtype]
        verdict = "ok" if error <= most else f"{WRONG}: above {most:g}"
        return [f"{error:.0e}", f"{seconds * 1e3:.2f}"], verdict

    def rows():
        for case, (int8, options) in cases.items():
            for backend in ("gather", "ragged", "triton"):
                yield backend, case, *judge(2, check, backend, int8, options)

    shape = " ".join(f"{name}={number}" for name, number in size.items())
    return Section(
        f"decoding: relative errors of the output; {dtype} {shape}",
        ("backend", "rows", "out", "ms", ""),
        rows(),
    )


def _shape(cpu_tokens: int) -> tuple[str, dict[str, int]]:
    """Returns dtype and sizes; on a CPU, where kernels are interpreted, rows are short."""
    if jax.default_backend() == "cpu":
        return "float32", {"B": 2, "T": cpu_tokens, "N": 4, "K": 2, "H": 16}
    return "bfloat16", {"B": 2, "T": 1024, "N": 4, "K": 2, "H": 128}


def _decode(
    backend: Any, int8: bool, given: list[Any], options: dict[str, Any]
) -> tuple[np.ndarray, float]:
    """Returns what all tokens got, and the seconds of the last one's."""
    q, k, v, _, positions, segments = map(jnp.asarray, given)
    rows, num_tokens, num_heads, head_dim = q.shape
    width = -(-num_tokens // PAGE)
    table = 1 + jnp.arange(rows * width, dtype=jnp.int32).reshape(rows, width)[:, ::-1]
    heads = (num_heads, k.shape[2], head_dim)
    pages = empty_pages(
        Rules().here(), 1 + rows * width, PAGE, heads, q.dtype, backend=backend, int8=int8
    )

    @jax.jit
    def run(pages, q, k, v, positions, segments):
        spans = {"positions": positions, "segments": segments}
        return attend_paged(q, k, v, pages, table, **spans, **options)

    tokens = (q, k, v, positions, segments)
    first, pages = run(pages, *(x[:, :-1] for x in tokens))
    last, pages = run(pages, *(x[:, -1:] for x in tokens))
    begin = time.perf_counter()
    jax.block_until_ready(run(pages, *(x[:, -1:] for x in tokens)))
    seconds = time.perf_counter() - begin
    return np.concatenate([np.asarray(x, np.float64) for x in (first, last)], axis=1), seconds


def _attention_inputs(size: dict[str, int], dtype: str, packed: bool) -> list[Any]:
    """(q, k, v, cotangent, positions, segments); three documents a row if packed, else one."""
    rng = np.random.default_rng(0)
    B, T, N, K, H = size.values()
    shapes = [(B, T, heads, H) for heads in (N, K, K, N)]
    arrays = [np.asarray(rng.standard_normal(shape), jnp.dtype(dtype)) for shape in shapes]
    starts = np.array([0, T // 5, T // 2] if packed else [0])
    place = np.arange(T)
    document = np.searchsorted(starts, place, side="right")
    rows = [place - starts[document - 1], document]
    return [*arrays, *(np.broadcast_to(x, (B, T)).astype(np.int32) for x in rows)]


def _attention_call(backend: Any, given: list[Any], options: dict[str, Any]) -> Callable:
    """Returns a function of nothing: (out, dq, dk, dv) of the backend."""
    q, k, v, g, positions, segments = map(jnp.asarray, given)
    packed = bool(np.any(given[-1] > 1))
    spans = (positions, segments) if packed else (positions, None)

    @jax.jit
    def run(q, k, v, g, positions, segments):
        def call(q, k, v):
            return attend(
                q,
                k,
                v,
                q_positions=positions,
                kv_positions=positions,
                q_segments=segments,
                kv_segments=segments,
                in_order=True,
                backend=backend,
                **options,
            )

        out, vjp = jax.vjp(call, q, k, v)
        return out, *vjp(g)

    return lambda: run(q, k, v, g, *spans)
