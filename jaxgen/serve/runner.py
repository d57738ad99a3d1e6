"""Runs the scheduler's plans: which program, with which arguments, compiled when.

The programs are a lattice of few shapes: `read` for chunks of 16, 32, ... `prefill_chunk` tokens of
one row a shard, `decode` for 1, 2, 4, ... rows a shard. Everything else is traced: how long a burst
is, how long contexts are, what each row asks for.
"""

import functools
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxgen.models.decoder import Decoder
from jaxgen.nn.attention import mesh_device, num_shards
from jaxgen.nn.paged import token_axes
from jaxgen.serve.cache import NUM_STOPS, DecodeState, Slots, empty_state
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.programs import Chunks, decode, read
from jaxgen.serve.scheduler import Chunk, Plan, Row
from jaxgen.sharding import abstract

SMALLEST_CHUNK = 16
# Where devices state no limit, as CPU does: what the pages of a shard take at most.
DEFAULT_KV_BYTES = 1 << 30
# XLA compiles on one core for the most part, and holds some GB for a large program.
COMPILE_THREADS = 4

Key = tuple[Literal["read", "decode"], int]
"""A program: its name, and the chunk's tokens or the rows of a shard."""


class Delivery(NamedTuple):
    """Tokens that a dispatched program makes, some of which belong to rows."""

    tokens: jax.Array
    """[B] or [B, burst]."""
    rows: list[tuple[int, Row]]
    """Places in B, and whose they are."""
    asked: int
    """Tokens for each at most."""

    def fetch(self) -> list[tuple[Row, list[int]]]:
        """Waits for the device and returns the tokens of each row."""
        tokens = np.asarray(self.tokens).reshape(self.tokens.shape[0], -1)
        return [(row, [t for t in tokens[at].tolist() if t >= 0]) for at, row in self.rows]


class Runner:
    """A model on its devices, with the state of decoding and the compiled programs.

    Make it inside the `jax.set_mesh(mesh)` of the model.

    Attributes:
        model: as `for_serving` made it.
        shards: into how many parts rows are split, each with its own slots and pages.
        slots_per_shard: rows that can run at once in each.
        block_size: tokens of a page on all devices that have a part of it.
        num_pages: of each shard.
        compilations: programs compiled so far.
    """

    def __init__(self, model: Decoder, config: EngineConfig):
        """Compiles what it needs to find room for the pages, where devices state their memory."""
        self.model, self.config = model, config
        self.mesh = jax.sharding.get_mesh()
        self.shards = model.rules.shards("batch", self.mesh)
        self.slots_per_shard = -(-config.max_num_seqs // self.shards)
        self.block_size = config.block_size * num_shards(token_axes(model.rules.here()))
        self.table_width = -(-model.config.max_seq_len // self.block_size)
        self.compilations = 0
        self._sealed = False
        self._programs: dict[Key, jax.stages.Compiled] = {}
        # A module is flattened by Python code: once, and not for every call.
        self._weights, self._structure = jax.tree.flatten(model)
        # XLA's CPU product of one bf16 row runs at a tenth of the speed of two.
        slow = mesh_device().platform == "cpu" and model.dtype == jnp.bfloat16
        self._smallest_batch = 2 if slow else 1
        self.num_pages = self._room() if config.kv_blocks is None else config.kv_blocks + 1
        self.state: DecodeState = jax.jit(self._empty, static_argnums=0)(self.num_pages)

    @property
    def lattice(self) -> list[Key]:
        """All programs that any traffic needs."""
        chunks = {self._chunk_size(n) for n in range(1, self.config.prefill_chunk + 1)}
        batches = {self._batch_size(n) for n in range(1, self.slots_per_shard + 1)}
        reads: list[Key] = [("read", chunk) for chunk in sorted(chunks)]
        decodes: list[Key] = [("decode", batch) for batch in sorted(batches)]
        return reads + decodes

    def compile(self, keys: Iterable[Key]) -> None:
        """Compiles programs, side by side."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._programs]
        with ThreadPoolExecutor(COMPILE_THREADS) as threads:
            compiled = threads.map(lambda key: self._compile(key, self.num_pages), missing)
            self._programs.update(zip(missing, compiled, strict=True))

    def compile_all(self) -> None:
        """Compiles the whole lattice; from now on nothing is compiled, whatever comes."""
        self.compile(self.lattice)
        self._sealed = True

    def compile_for(self, num_requests: int) -> None:
        """Compiles the decoding of so many requests at once."""
        per_shard = min(-(-num_requests // self.shards), self.slots_per_shard)
        self.compile([("decode", self._batch_size(per_shard))])

    def dispatch(self, plan: Plan) -> list[Delivery]:
        """Gives a plan to the device and returns what will come of it."""
        deliveries = [self._read(chunks) for chunks in plan.rounds]
        if plan.rows:
            deliveries.append(self._decode(plan.rows, plan.steps))
        deliveries = [delivery for delivery in deliveries if delivery.rows]
        for delivery in deliveries:
            delivery.tokens.copy_to_host_async()
        return deliveries

    def _read(self, chunks: list[Chunk]) -> Delivery:
        size = self._chunk_size(max(chunk.size for chunk in chunks))
        args = self._no_chunks(size)
        for chunk in chunks:
            row, at = chunk.row, chunk.row.shard
            sampling = row.request.sampling
            args.tokens[at, : chunk.size] = row.tokens[chunk.start : chunk.start + chunk.size]
            args.table[at, : len(row.blocks)] = row.blocks
            args.starts[at], args.sizes[at] = chunk.start, chunk.size
            if not chunk.last:
                continue
            args.last[at], args.slots[at] = True, row.slot
            asked = args.asked
            asked.limits[at] = row.request.limit
            stop_ids = sorted(row.request.stop_ids)[:NUM_STOPS]
            asked.stop_ids[at, : len(stop_ids)] = stop_ids
            asked.seeds[at], asked.temperature[at] = sampling.seed, sampling.temperature
            asked.top_k[at], asked.top_p[at] = sampling.top_k, sampling.top_p
        tokens = self._run(("read", size), args)
        return Delivery(tokens, [(c.row.shard, c.row) for c in chunks if c.last], 1)

    def _decode(self, rows: list[Row], steps: int) -> Delivery:
        by_shard = [[row for row in rows if row.shard == s] for s in range(self.shards)]
        batch = self._batch_size(max(map(len, by_shard)))
        if not self._sealed:
            # A larger batch costs less than a compilation, as the last requests of many end.
            ready = [n for name, n in self._programs if name == "decode" and n >= batch]
            batch = min(ready, default=batch)
        table, slots = self._no_rows(batch)
        places = []
        for shard, mine in enumerate(by_shard):
            for at, row in enumerate(mine, start=shard * batch):
                table[at, : len(row.blocks)], slots[at] = row.blocks, row.slot
                places.append((at, row))
        tokens = self._run(("decode", batch), table, slots, np.int32(steps))
        return Delivery(tokens, places, steps)

    def _run(self, key: Key, *args: Any) -> jax.Array:
        if key not in self._programs:
            assert not self._sealed, f"{key} is not among the programs compiled ahead"
            self.compile([key])
        self.state, tokens = self._programs[key](self._weights, self.state, *args)
        return tokens

    def _no_chunks(self, size: int) -> Chunks:
        """Arguments of `read` in which every row only fills the batch."""
        rows, nobody = self.shards, self.shards * self.slots_per_shard

        def line(value: Any, dtype: Any, *shape: int) -> Any:
            return np.full((rows, *shape), value, dtype)

        return Chunks(
            tokens=line(0, np.int32, size),
            table=line(0, np.int32, self.table_width),
            starts=line(0, np.int32),
            sizes=line(0, np.int32),
            last=line(False, np.bool_),
            slots=line(nobody, np.int32),
            asked=Slots.nobodys(line),
        )

    def _no_rows(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The table and the slots of a `decode` in which every row only fills the batch."""
        rows, nobody = self.shards * batch, self.shards * self.slots_per_shard
        return np.zeros((rows, self.table_width), np.int32), np.full(rows, nobody, np.int32)

    def _chunk_size(self, tokens: int) -> int:
        power = max(SMALLEST_CHUNK, 1 << (tokens - 1).bit_length())
        return min(power, self.config.prefill_chunk)

    def _batch_size(self, rows: int) -> int:
        return max(self._smallest_batch, 1 << (rows - 1).bit_length())

    def _empty(self, num_pages: int) -> DecodeState:
        slots = self.shards * self.slots_per_shard
        return empty_state(
            self.model,
            slots,
            num_pages,
            self.config.block_size,
            attention=self.config.attention,
            int8=self.config.kv_dtype == "int8",
        )

    def _compile(self, key: Key, num_pages: int) -> jax.stages.Compiled:
        name, size = key
        host: tuple[Any, ...]
        if name == "read":
            program, host = read, (self._no_chunks(size),)
        else:
            program = functools.partial(decode, burst=self.config.burst)
            host = (*self._no_rows(size), np.int32(0))

        def call(weights, state, *host):
            return program(jax.tree.unflatten(self._structure, weights), state, *host)

        # Threads have no mesh of their own.
        with jax.set_mesh(self.mesh):
            state = abstract(functools.partial(self._empty, num_pages), self.mesh)
            lowered = jax.jit(call, donate_argnums=1).lower(self._weights, state, *host)
            compiled = lowered.compile()
        self.compilations += 1
        return compiled

    def _room(self) -> int:
        """Pages of each shard: what the largest programs leave of a device's memory.

        At most all that `max_num_seqs` sequences of full length need.
        """

        def held(num_pages: int) -> int:
            """Bytes of each device."""
            leaves = jax.tree.leaves(abstract(lambda: self._empty(num_pages), self.mesh).layers)
            return sum(
                math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
            )

        page = held(2) - held(1)
        device = jax.local_devices()[0]
        memory = device.memory_stats() or {}
        room = DEFAULT_KV_BYTES
        if "bytes_limit" in memory:
            largest: list[Key] = [
                ("read", self.config.prefill_chunk),
                ("decode", self._batch_size(self.slots_per_shard)),
            ]
            # What a program needs besides the pages does not depend on their number.
            needs: list[Any] = [self._compile(key, 2).memory_analysis() for key in largest]
            # Twice: a program is started before the last one has given its memory back.
            needed = 2 * max(need.temp_size_in_bytes + need.output_size_in_bytes for need in needs)
            room = memory["bytes_limit"] - memory["bytes_in_use"] - needed
        pages = min(room // page, self.slots_per_shard * self.table_width + 1)
        # All processes must plan alike.
        return int(np.min(multihost_utils.process_allgather(np.int32(pages))))
