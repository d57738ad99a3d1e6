"""Runs the scheduler's plans: which program, with which arguments, compiled when.

The programs are a lattice of few shapes: `read` for chunks of 16, 32, ... `prefill_chunk` tokens of
one row a shard, `decode` for 1, 2, 4, ... rows a shard; and small ones, `shape` for one request,
`mask` for 1, 2, 4, ... of them. Everything else is traced: how long a burst
is, how long contexts are, what each row asks for.
"""

import functools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxgen.models.decoder import Decoder
from jaxgen.nn.attention import mesh_device
from jaxgen.progress import progress
from jaxgen.serve.cache import DecodeState, Slots, empty_state
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.delivery import Delivery
from jaxgen.serve.programs import Chunks, decode, mask, read, shape
from jaxgen.serve.sampler import Scores
from jaxgen.serve.scheduler import Burst, Chunk, Plan, Row

SMALLEST_CHUNK = 16
# Where devices state no limit, as CPU does: what the pages of a shard take at most.
DEFAULT_KV_BYTES = 1 << 30
# XLA compiles on one core for the most part, and holds some GB for a large program.
COMPILE_THREADS = 4

Key = tuple[Literal["read", "decode", "shape", "mask"], int]
"""A program: its name, and the chunk's tokens, the rows of a shard or those of all."""


class Runner:
    """A model on its devices, with the state of decoding and the compiled programs.

    Make it inside the `jax.set_mesh(mesh)` of the model.

    Attributes:
        model: as `for_serving` made it.
        shards: into how many parts rows are split, each with its own slots and pages.
        slots_per_shard: rows that can run at once in each.
        num_pages: of each shard.
        compilations: programs compiled so far.
    """

    def __init__(self, model: Decoder, config: EngineConfig):
        """Compiles what it needs to find room for the pages, where devices state their memory."""
        self.model, self.config = model, config
        self.mesh = jax.sharding.get_mesh()
        self.shards = model.rules.shards("batch", self.mesh)
        self.slots_per_shard = -(-config.max_num_seqs // self.shards)
        self.table_width = -(-model.config.max_seq_len // config.block_size)
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
        masks: list[Key] = [("mask", 1 << n) for n in range((self._nobody - 1).bit_length() + 1)]
        return [*reads, *decodes, ("shape", 1), *masks]

    def compile(self, keys: Iterable[Key]) -> None:
        """Compiles programs, side by side."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._programs]
        with (
            progress(f"compiling {len(missing)} programs", len(missing), in_bytes=False) as show,
            ThreadPoolExecutor(COMPILE_THREADS) as threads,
        ):
            started = {threads.submit(self._compile, key, self.num_pages): key for key in missing}
            for done, future in enumerate(as_completed(started), start=1):
                self._programs[started[future]] = future.result()
                show(done)

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
        deliveries += [self._decode(burst) for burst in plan.bursts]
        deliveries = [delivery for delivery in deliveries if delivery.rows]
        for delivery in deliveries:
            delivery.copy_to_host()
        return deliveries

    def replace(self, staged: list[jax.Array]) -> None:
        """Takes other weights, all alike but for their values, out of a list of arrays anywhere.

        Nothing may run. Leaf by leaf: devices hold one of them besides one model.
        """
        leaves, structure = jax.tree.flatten(self.model)
        # Without arrays, which would be owned once more.
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        self.model = jax.tree.unflatten(structure, shapes)
        shardings = [leaf.sharding for leaf in leaves]
        del leaves
        for i, sharding in enumerate(shardings):
            self._weights[i] = None
            self._weights[i] = jax.device_put(staged.pop(0), sharding)
        jax.block_until_ready(self._weights)
        self.model = jax.tree.unflatten(structure, self._weights[: len(shardings)])

    def _read(self, chunks: list[Chunk]) -> Delivery:
        size = self._chunk_size(max(chunk.size for chunk in chunks))
        args = self._no_chunks(size)
        for chunk in chunks:
            row, at = chunk.row, chunk.row.shard
            args.tokens[at, : chunk.size] = row.tokens[chunk.start : chunk.start + chunk.size]
            args.table[at, : len(row.blocks)] = row.blocks
            args.starts[at], args.sizes[at] = chunk.start, chunk.size
            if not chunk.last:
                continue
            args.last[at], args.slots[at] = True, row.slot
            args.asked.ask(at, row.request)
        begins = [chunk.row for chunk in chunks if chunk.last]
        for row in begins:
            self._shape(row)
        self._mask([row for row in begins if row.request.length < row.request.masked_until])
        tokens, scores = self._run(("read", size), args)
        return Delivery(tokens, [(row.shard, row) for row in begins], 1, scores)

    def _shape(self, row: Row) -> None:
        """Tells the device of a row's bias and of the tokens it has, if it has to know."""
        request = row.request
        if not request.sampling.shapes:
            return
        _, bias, prompt, counts = self._no_shape()
        for token, value in request.sampling.logit_bias:
            bias[token] = value
        prompt[list(request.prompt)] = True
        np.add.at(counts, request.output, 1)
        self._write(("shape", 1), np.int32(row.slot), bias, prompt, counts)

    def _mask(self, rows: list[Row]) -> None:
        """Tells the device what can be drawn next in some rows."""
        if not rows:
            return
        slots, masks = self._no_masks(1 << (len(rows) - 1).bit_length())
        for at, row in enumerate(rows):
            slots[at], mask = row.slot, row.request.mask
            masks[at] = row.request.lengthened(masks[at]) if mask is None else mask
        self._write(("mask", len(slots)), slots, masks)

    def _decode(self, burst: Burst) -> Delivery:
        by_shard = [[row for row in burst.rows if row.shard == s] for s in range(self.shards)]
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
        self._mask([row for row in burst.rows if row.request.mask is not None])
        tokens, scores = self._run(("decode", batch), table, slots, np.int32(burst.steps))
        return Delivery(tokens, places, burst.steps, scores)

    def _run(self, key: Key, *args: Any) -> tuple[jax.Array, Scores]:
        self.state, *came = self._program(key)(self._weights, self.state, *args)
        tokens, scores = came
        return tokens, scores

    def _write(self, key: Key, *args: Any) -> None:
        self.state = self.state._replace(vocab=self._program(key)(self.state.vocab, *args))

    def _program(self, key: Key) -> jax.stages.Compiled:
        if key not in self._programs:
            assert not self._sealed, f"{key} is not among the programs compiled ahead"
            self._programs[key] = self._compile(key, self.num_pages)
        return self._programs[key]

    def _no_chunks(self, size: int) -> Chunks:
        """Arguments of `read` in which every row only fills the batch."""
        rows = self.shards

        def line(value: Any, dtype: Any, *shape: int) -> Any:
            return np.full((rows, *shape), value, dtype)

        return Chunks(
            tokens=line(0, np.int32, size),
            table=line(0, np.int32, self.table_width),
            starts=line(0, np.int32),
            sizes=line(0, np.int32),
            last=line(False, np.bool_),
            slots=line(self._nobody, np.int32),
            asked=Slots.nobodys(line),
        )

    def _no_rows(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The table and the slots of a `decode` in which every row only fills the batch."""
        rows = self.shards * batch
        return np.zeros((rows, self.table_width), np.int32), np.full(rows, self._nobody, np.int32)

    def _no_shape(self) -> tuple[np.int32, np.ndarray, np.ndarray, np.ndarray]:
        """Arguments of `shape` for nobody's slot, no bias and no tokens."""
        size = self.model.config.vocab_size
        rows = (np.zeros(size, dtype) for dtype in (np.float32, np.bool_, np.int32))
        bias, prompt, counts = rows
        return np.int32(self._nobody), bias, prompt, counts

    def _no_masks(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Arguments of `mask` in which every row only fills the batch; masks that hide nothing."""
        words = -(-self.model.config.vocab_size // 32)
        masks = np.full((rows, words), 2**32 - 1, np.uint32)
        return np.full(rows, self._nobody, np.int32), masks

    @property
    def _nobody(self) -> int:
        """The slot of rows that only fill a batch."""
        return self.shards * self.slots_per_shard

    def _chunk_size(self, tokens: int) -> int:
        power = max(SMALLEST_CHUNK, 1 << (tokens - 1).bit_length())
        return min(power, self.config.prefill_chunk)

    def _batch_size(self, rows: int) -> int:
        return max(self._smallest_batch, 1 << (rows - 1).bit_length())

    def _empty(self, num_pages: int) -> DecodeState:
        return empty_state(self.model, self._nobody, num_pages, self.config.block_size)

    def _compile(self, key: Key, num_pages: int) -> jax.stages.Compiled:
        name, size = key
        host: tuple[Any, ...]
        if name == "read":
            program, host = read, (self._no_chunks(size),)
        elif name == "decode":
            program = functools.partial(decode, burst=self.config.burst)
            host = (*self._no_rows(size), np.int32(0))
        elif name == "shape":
            program, host = shape, self._no_shape()
        else:
            program, host = mask, self._no_masks(size)

        def call(weights, state, *host):
            return program(jax.tree.unflatten(self._structure, weights), state, *host)

        # Threads have no mesh of their own.
        with jax.set_mesh(self.mesh):
            state = jax.eval_shape(functools.partial(self._empty, num_pages))
            state = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape,
                    x.dtype,
                    sharding=jax.sharding.NamedSharding(self.mesh, x.sharding.spec),
                ),
                state,
            )
            if name in ("read", "decode"):
                lowered = jax.jit(call, donate_argnums=1).lower(self._weights, state, *host)
            else:
                lowered = jax.jit(program, donate_argnums=0).lower(state.vocab, *host)
            compiled = lowered.compile()
        self.compilations += 1
        return compiled

    def _room(self) -> int:
        """Pages of each shard: what the largest programs leave of a device's memory.

        At most all that `max_num_seqs` sequences of full length need.
        """
        config = self.model.config
        rules = self.model.rules.here()
        per_page = config.num_kv_heads if rules.kv_heads == rules.heads else config.num_heads
        heads = per_page // self.model.rules.shards("heads", self.mesh)
        page = heads * self.config.block_size * config.head_dim * self.model.dtype.itemsize
        page *= 2 * config.num_layers
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
            # Twice: a program is started before the last one has given its memory back. The state
            # is there once; it is the same memory before and after.
            state = max(need.alias_size_in_bytes for need in needs)
            needed = state + 2 * max(
                need.temp_size_in_bytes + need.output_size_in_bytes - need.alias_size_in_bytes
                for need in needs
            )
            room = memory["bytes_limit"] - memory["bytes_in_use"] - needed
        pages = min(room // page, self.slots_per_shard * self.table_width + 1)
        # All processes must plan alike.
        return int(np.min(multihost_utils.process_allgather(np.int32(pages))))
