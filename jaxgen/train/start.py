"""The start of a run: its programs compile while its data gets ready."""

import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from jaxgen.compiler import compiler_options
from jaxgen.data.dataset import find
from jaxgen.data.loader import Loader
from jaxgen.data.tokenizer import check_vocab
from jaxgen.fit import fitting_mesh
from jaxgen.train.program import batch_sharding

if TYPE_CHECKING:
    from jaxgen.config import TrainConfig

_CACHE_HIT = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True)
class Program:
    """A program, what it took to get, and whether compiling it was a hit or a miss of the cache."""

    run: jax.stages.Compiled
    lower_s: float
    compile_s: float
    cache: str
    """hit, miss, or off."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with; a program's future is read when it is first needed."""

    mesh: Mesh
    traced: tuple[Future[Any], ...]
    """Of each program: fails with what its tracing refuses, long before it is compiled."""
    programs: tuple[Future[Program], ...]
    loader: Loader
    data_s: float
    """Seconds from the configuration to the loader."""


@contextlib.contextmanager
def start(
    config: "TrainConfig",
    mesh: Mesh | None,
    *lower: Callable[["TrainConfig", Mesh], jax.stages.Lowered],
) -> Iterator[Start]:
    """Enters the mesh of a run, with its data at hand and its programs under way.

    Compiling takes one core and most of the start, and cannot be interrupted. So programs are
    traced at once, in a thread each, and compiled as soon as the files and the tokenizer are found:
    a mistake there is raised without waiting for the compiler.

    Args:
        config: the run.
        mesh: what to run on; None makes `config.mesh` of all devices.
        lower: for each program, what traces it.

    Raises:
        UserError: something in the config or the data cannot work.
    """
    if mesh is None:
        mesh = fitting_mesh(config)
    else:
        config.check(mesh)
    data_found: Future[None] = Future()
    with (
        jax.set_mesh(mesh),
        concurrent.futures.ThreadPoolExecutor(len(lower), "compile") as pool,
    ):
        traced = [pool.submit(_timed, lambda one=one: one(config, mesh)) for one in lower]
        programs = [pool.submit(_compile, one, mesh, data_found) for one in traced]
        begin = time.perf_counter()
        try:
            found = find(config.data, config.train.seq_len)
            if found.tokenizer:
                check_vocab(found.tokenizer, config.model.vocab_size)
        except BaseException:
            data_found.cancel()
            raise
        data_found.set_result(None)
        packed = found.pack()
        check_vocab(packed.tokenizer, config.model.vocab_size)
        loader = Loader(packed, config.train.batch_size, batch_sharding(config, mesh))
        yield Start(mesh, tuple(traced), tuple(programs), loader, time.perf_counter() - begin)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    return call(), time.perf_counter() - begin


def _compile(
    traced: Future[tuple[jax.stages.Lowered, float]], mesh: Mesh, data_found: Future[None]
) -> Program:
    me, hits = threading.get_ident(), []

    def listen(event: str, **_: Any) -> None:
        # JAX calls this in the thread that compiles; others compile programs meanwhile.
        if event == _CACHE_HIT and threading.get_ident() == me:
            hits.append(event)

    lowered, lower_s = traced.result()
    data_found.result()  # Cancelled, it ends this thread.
    jax.monitoring.register_event_listener(listen)
    try:
        options = compiler_options(mesh)
        compiled, compile_s = _timed(lambda: lowered.compile(compiler_options=options))
    finally:
        jax.monitoring.unregister_event_listener(listen)
    on = jax.config.values.get("jax_compilation_cache_dir")
    return Program(compiled, lower_s, compile_s, "hit" if hits else "miss" if on else "off")
