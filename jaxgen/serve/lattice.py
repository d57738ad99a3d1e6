"""The programs of an engine: which shapes they have, and their compilation, ahead or when needed.

They are a lattice of few shapes: `read` for chunks of 16, 32, ... `prefill_chunk` tokens of one row
a shard, `decode` for 1, 2, 4, ... rows a shard, or `speculate` in its place for as many as that may
be on for; and small ones, `shape` and `note` for one request, `mask` for 1, 2, 4, ... of them.
Everything else is traced: how long a burst is, how long contexts are, what each row asks for.
"""

import functools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxgen.errors import UserError
from jaxgen.models.decoder import Decoder
from jaxgen.nn.attention import mesh_device, num_shards
from jaxgen.nn.paged import token_axes
from jaxgen.progress import progress
from jaxgen.serve.cache import DecodeState, Slots, empty_drafts, empty_state
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.drafts import decode_noting, note, read_both
from jaxgen.serve.programs import Chunks, decode, mask, read, shape
from jaxgen.serve.speculate import speculate
from jaxgen.sharding import abstract

SMALLEST_CHUNK = 16
# Where devices state no limit, as CPU does: what the pages of a shard take at most.
DEFAULT_KV_BYTES = 1 << 30
# XLA compiles on one core for the most part, and holds some GB for a large program.
COMPILE_THREADS = 4

Key = tuple[Literal["read", "decode", "speculate", "shape", "mask", "note"], int]
"""A program: its name, and the chunk's tokens, the rows of a shard, those of all or a prompt's
tokens."""


class Lattice:
    """The shapes and the compiled programs of a model, which is abstract here.

    Make it inside the `jax.set_mesh(mesh)` of the model.

    Attributes:
        shards: into how many parts rows are split, each with its own slots and pages.
        slots_per_shard: rows that can run at once in each.
        nobody: the slot of rows that only fill a batch.
        block_size: tokens of a page on all devices that have a part of it.
        num_pages: of each shard.
        programs: those that are compiled.
        compilations: how many have been, also to find out what they need.
        sealed: whether nothing may be compiled any more.
    """

    def __init__(self, model: Decoder, draft: Decoder | None, config: EngineConfig):
        """Compiles what it needs to find room for the pages, where devices state their memory."""
        self._model, self._draft = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (model, draft)
        )
        self._weights, self._structure = jax.tree.flatten((self._model, self._draft))
        self._config, self._mesh = config, jax.sharding.get_mesh()
        self.speculates = config.speculation != "off"
        self.shards = model.rules.shards("batch", self._mesh)
        self.slots_per_shard = -(-config.max_num_seqs // self.shards)
        self.nobody = self.shards * self.slots_per_shard
        self.block_size = config.block_size * num_shards(token_axes(model.rules.here()))
        self._table_width = -(-model.config.max_seq_len // self.block_size)
        # XLA's CPU product of one bf16 row runs at a tenth of the speed of two.
        slow = mesh_device().platform == "cpu" and model.dtype == jnp.bfloat16
        self._smallest_batch = 2 if slow else 1
        self.programs: dict[Key, jax.stages.Compiled] = {}
        self.compilations = 0
        self.sealed = False
        self.num_pages = self._room() if config.kv_blocks is None else config.kv_blocks + 1

    @property
    def keys(self) -> list[Key]:
        """All programs that any traffic needs."""
        chunks = {self.chunk_size(n) for n in range(1, self._config.prefill_chunk + 1)}
        reads: list[Key] = [("read", chunk) for chunk in sorted(chunks)]
        masks: list[Key] = [("mask", 1 << n) for n in range((self.nobody - 1).bit_length() + 1)]
        notes: list[Key] = [("note", self._model.config.max_seq_len)] * self.speculates
        return [*reads, *self._decodes, ("shape", 1), *masks, *notes]

    @property
    def _decodes(self) -> list[Key]:
        batches = {self.batch_size(n) for n in range(1, self.slots_per_shard + 1)}
        return [(self.kind(batch), batch) for batch in sorted(batches)]

    def kind(self, batch: int) -> Literal["decode", "speculate"]:
        """The program that decodes so many rows a shard."""
        most = min(self._config.speculation_max_seqs, self.slots_per_shard)
        return "speculate" if self.speculates and batch <= self.batch_size(most) else "decode"

    def chunk_size(self, tokens: int) -> int:
        """The tokens of the program that reads so many."""
        power = max(SMALLEST_CHUNK, 1 << (tokens - 1).bit_length())
        return min(power, self._config.prefill_chunk)

    def batch_size(self, rows: int) -> int:
        """The rows a shard of the program that decodes so many."""
        return max(self._smallest_batch, 1 << (rows - 1).bit_length())

    def no_chunks(self, size: int) -> Chunks:
        """Arguments of `read` in which every row only fills the batch."""
        rows = self.shards

        def line(value: Any, dtype: Any, *shape: int) -> Any:
            return np.full((rows, *shape), value, dtype)

        return Chunks(
            tokens=line(0, np.int32, size),
            table=line(0, np.int32, self._table_width),
            starts=line(0, np.int32),
            sizes=line(0, np.int32),
            last=line(False, np.bool_),
            slots=line(self.nobody, np.int32),
            asked=Slots.nobodys(line),
        )

    def no_rows(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The table and the slots of a `decode` in which every row only fills the batch."""
        rows = self.shards * batch
        return np.zeros((rows, self._table_width), np.int32), np.full(rows, self.nobody, np.int32)

    def no_shape(self) -> tuple[np.int32, np.ndarray, np.ndarray, np.ndarray]:
        """Arguments of `shape` for nobody's slot, no bias and no tokens."""
        size = self._model.config.vocab_size
        bias, prompt, counts = (np.zeros(size, dtype) for dtype in (np.float32, np.bool_, np.int32))
        return np.int32(self.nobody), bias, prompt, counts

    def no_masks(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Arguments of `mask` in which every row only fills the batch; masks that hide nothing."""
        words = -(-self._model.config.vocab_size // 32)
        masks = np.full((rows, words), 2**32 - 1, np.uint32)
        return np.full(rows, self.nobody, np.int32), masks

    def empty(self, num_pages: int) -> DecodeState:
        """Returns the state of decoding when nobody has asked."""
        sizes = (self.nobody, num_pages, self._config)
        state = empty_state(self._model, *sizes)
        if not self.speculates:
            return state
        return state._replace(drafts=empty_drafts(self._model, self._draft, *sizes))

    def compiled(self, key: Key) -> jax.stages.Compiled:
        """Returns a program, which has been compiled ahead once the lattice is sealed."""
        if key not in self.programs:
            assert not self.sealed, f"{key} is not among the programs compiled ahead"
            self.programs[key] = self.compile(key, self.num_pages)
        return self.programs[key]

    def compile_all(self, keys: Iterable[Key]) -> None:
        """Compiles programs, side by side."""
        missing = [key for key in dict.fromkeys(keys) if key not in self.programs]
        with (
            progress(f"compiling {len(missing)} programs", len(missing), in_bytes=False) as show,
            ThreadPoolExecutor(COMPILE_THREADS) as threads,
        ):
            started = {threads.submit(self.compile, key, self.num_pages): key for key in missing}
            for done, future in enumerate(as_completed(started), start=1):
                self.programs[started[future]] = future.result()
                show(done)

    def compile(self, key: Key, num_pages: int) -> jax.stages.Compiled:
        """Returns a new program, for so many pages a shard."""
        name, size = key
        host: tuple[Any, ...]
        if name == "read":
            host = (self.no_chunks(size),)
        elif name == "shape":
            host = self.no_shape()
        elif name == "mask":
            host = self.no_masks(size)
        elif name == "note":
            host = (np.int32(0), np.zeros(size, np.int32))
        else:
            host = (*self.no_rows(size), np.int32(0), *[np.False_] * (name == "speculate"))

        def call(weights, state, *host):
            model, draft = jax.tree.unflatten(self._structure, weights)
            return self._large(name, model, draft)(state, *host)

        # Threads have no mesh of their own.
        with jax.set_mesh(self._mesh):
            state: Any = abstract(functools.partial(self.empty, num_pages), self._mesh)
            small = {"shape": shape, "mask": mask, "note": note}
            if name in small:
                part = state.drafts.history if name == "note" else state.vocab
                lowered = jax.jit(small[name], donate_argnums=0).lower(part, *host)
            else:
                lowered = jax.jit(call, donate_argnums=1).lower(self._weights, state, *host)
            compiled = lowered.compile()
        self.compilations += 1
        return compiled

    def _large(self, name: str, model: Decoder, draft: Decoder | None) -> Callable[..., Any]:
        """A program that runs a model."""
        if name == "speculate":
            return functools.partial(speculate, model, draft, config=self._config)
        if name == "read":
            both = functools.partial(read_both, model, draft)
            return both if self.speculates else functools.partial(read, model)
        program = decode_noting if self.speculates else decode
        return functools.partial(program, model, burst=self._config.burst)

    def _room(self) -> int:
        """Pages of each shard: what the largest programs leave of a device's memory.

        At most all that `max_num_seqs` sequences of full length need.
        """

        def held(num_pages: int) -> int:
            """Bytes of each device."""
            leaves = jax.tree.leaves(abstract(lambda: self.empty(num_pages), self._mesh))
            return sum(
                math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
            )

        page = held(2) - held(1)
        memory = jax.local_devices()[0].memory_stats() or {}
        room = DEFAULT_KV_BYTES
        if "bytes_limit" in memory:
            last: dict[str, Key] = {key[0]: key for key in self._decodes}
            largest: list[Key] = [("read", self._config.prefill_chunk), *last.values()]
            # What a program needs besides the pages does not depend on their number.
            needs: list[Any] = [self.compile(key, 2).memory_analysis() for key in largest]
            # Twice: a program is started before the last one has given its memory back. The state
            # is there once; it is the same memory before and after.
            state = max(need.alias_size_in_bytes for need in needs)
            needed = state + 2 * max(
                need.temp_size_in_bytes + need.output_size_in_bytes - need.alias_size_in_bytes
                for need in needs
            )
            room = memory["bytes_limit"] - memory["bytes_in_use"] - needed
        if room < 2 * page:
            raise UserError(
                f"weights and programs leave {max(0, room) / 2**20:,.0f} MiB of a device for the "
                f"cache, whose pages of {self.block_size} tokens take {page / 2**20:,.1f} MiB; use "
                "--engine.weights int8, a smaller --engine.max_num_seqs or "
                "--engine.prefill_chunk, or more devices"
            )
        pages = min(room // page, self.slots_per_shard * self._table_width + 1)
        # All processes must plan alike.
        return int(np.min(multihost_utils.process_allgather(np.int32(pages))))
