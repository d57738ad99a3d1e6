"""Runs the scheduler's plans: which program, with which arguments, compiled when.

The programs are a lattice of few shapes: `read` for chunks of 16, 32, ... `prefill_chunk` tokens of
one row a shard, `decode` for 1, 2, 4, ... rows a shard, or `speculate` in its place for as many as
that may be on for; and small ones, `shape` and `note` for one request, `mask` for 1, 2, 4, ... of
them. Everything else is traced: how long a burst is, how long contexts are, what each row asks for.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxgen.models.decoder import Decoder
from jaxgen.nn.attention import mesh_device, num_shards
from jaxgen.nn.paged import token_axes
from jaxgen.progress import progress
from jaxgen.serve.cache import DecodeState, Slots, empty_drafts, empty_state
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.delivery import Delivery
from jaxgen.serve.drafts import check_draft, decode_noting, note, read_both
from jaxgen.serve.plan import Burst, Chunk, Plan, Row
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

    def __init__(self, model: Decoder, config: EngineConfig, draft: Decoder | None = None):
        """Compiles what it needs to find room for the pages, where devices state their memory."""
        check_draft(model, draft, config)
        self.model, self.config, self.draft = model, config, draft
        self.speculates = config.speculation != "off"
        self.mesh = jax.sharding.get_mesh()
        self.shards = model.rules.shards("batch", self.mesh)
        self.slots_per_shard = -(-config.max_num_seqs // self.shards)
        self.block_size = config.block_size * num_shards(token_axes(model.rules.here()))
        self.table_width = -(-model.config.max_seq_len // self.block_size)
        self.compilations = 0
        self._sealed = False
        self._programs: dict[Key, jax.stages.Compiled] = {}
        # A module is flattened by Python code: once, and not for every call.
        self._weights, self._structure = jax.tree.flatten((model, draft))
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
        decodes: list[Key] = [(self._kind(batch), batch) for batch in sorted(batches)]
        masks: list[Key] = [("mask", 1 << n) for n in range((self._nobody - 1).bit_length() + 1)]
        notes: list[Key] = [("note", self.model.config.max_seq_len)] * self.speculates
        return [*reads, *decodes, ("shape", 1), *masks, *notes]

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
        sizes = {self._batch_size(per_shard)}
        if self.speculates:
            sizes.add(self._batch_size(min(per_shard, self.config.speculation_max_seqs)))
        self.compile([(self._kind(batch), batch) for batch in sizes])

    def dispatch(self, plan: Plan) -> list[Delivery]:
        """Gives a plan to the device and returns what will come of it."""
        deliveries = [self._read(chunks) for chunks in plan.rounds]
        now = time.perf_counter()
        for burst in plan.bursts:
            # What is timed is a step of one token a row, and nothing else.
            plain = burst.width == 1 and not plan.rounds
            deliveries.append(self._decode(burst)._replace(begun_s=now if plain else None))
        deliveries = [delivery for delivery in deliveries if delivery.rows]
        for delivery in deliveries:
            delivery.copy_to_host()
        return deliveries

    def replace(self, staged: list[jax.Array]) -> None:
        """Takes other weights, all alike but for their values, out of a list of arrays anywhere.

        Nothing may run. Leaf by leaf: devices hold one of them besides the models.

        Args:
            staged: the model's, and then the draft model's unless those stay.
        """
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self._weights]
        shardings = [leaf.sharding for leaf in self._weights[: len(staged)]]
        # Without arrays, which would be owned once more.
        self.model, self.draft = jax.tree.unflatten(self._structure, shapes)
        for i, sharding in enumerate(shardings):
            self._weights[i] = None
            self._weights[i] = jax.device_put(staged.pop(0), sharding)
        jax.block_until_ready(self._weights)
        self.model, self.draft = jax.tree.unflatten(self._structure, self._weights)

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
            self._note(row)
        self._mask([row for row in begins if row.request.length < row.request.masked_until])
        tokens, scores = self._run(("read", size), args)
        return Delivery(tokens, [(row.shard, row) for row in begins], 1, 1, scores)

    def _note(self, row: Row) -> None:
        """Tells the device of all tokens of a row, if it guesses from them."""
        if self.speculates:
            length = self.model.config.max_seq_len
            tokens = np.zeros(length, np.int32)
            tokens[: len(row.tokens)] = row.tokens
            self._write(("note", length), np.int32(row.slot), tokens)

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
            kinds = ("speculate",) if burst.width > 1 else ("decode", "speculate")
            ready = [n for kind, n in self._programs if kind in kinds and n >= batch]
            batch = min(ready, default=batch)
        kind = self._kind(batch)
        table, slots = self._no_rows(batch)
        places = []
        for shard, mine in enumerate(by_shard):
            for at, row in enumerate(mine, start=shard * batch):
                table[at, : len(row.blocks)], slots[at] = row.blocks, row.slot
                places.append((at, row))
        self._mask([row for row in burst.rows if row.request.mask is not None])
        wide = [np.bool_(burst.width > 1)] * (kind == "speculate")
        made = self._run((kind, batch), table, slots, np.int32(burst.steps), *wide)
        tokens, scores, *guessed = made
        delivery = Delivery(tokens, places, burst.steps * burst.width, burst.steps, scores)
        return delivery._replace(guessed=guessed[0]) if guessed else delivery

    def _run(self, key: Key, *args: Any) -> list[Any]:
        self.state, *came = self._compiled(key)(self._weights, self.state, *args)
        return came

    def _write(self, key: Key, *args: Any) -> None:
        program, state = self._compiled(key), self.state
        if key[0] != "note":
            self.state = state._replace(vocab=program(state.vocab, *args))
        elif state.drafts is not None:
            history = program(state.drafts.history, *args)
            self.state = state._replace(drafts=state.drafts._replace(history=history))

    def _compiled(self, key: Key) -> jax.stages.Compiled:
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

    def _kind(self, batch: int) -> Literal["decode", "speculate"]:
        """The program that decodes so many rows a shard."""
        most = min(self.config.speculation_max_seqs, self.slots_per_shard)
        return "speculate" if self.speculates and batch <= self._batch_size(most) else "decode"

    def _chunk_size(self, tokens: int) -> int:
        power = max(SMALLEST_CHUNK, 1 << (tokens - 1).bit_length())
        return min(power, self.config.prefill_chunk)

    def _batch_size(self, rows: int) -> int:
        return max(self._smallest_batch, 1 << (rows - 1).bit_length())

    def _empty(self, num_pages: int) -> DecodeState:
        sizes = (self._nobody, num_pages, self.config)
        state = empty_state(self.model, *sizes)
        if not self.speculates:
            return state
        return state._replace(drafts=empty_drafts(self.model, self.draft, *sizes))

    def _compile(self, key: Key, num_pages: int) -> jax.stages.Compiled:
        name, size = key
        host: tuple[Any, ...]
        if name == "read":
            host = (self._no_chunks(size),)
        elif name == "shape":
            host = self._no_shape()
        elif name == "mask":
            host = self._no_masks(size)
        elif name == "note":
            host = (np.int32(0), np.zeros(size, np.int32))
        else:
            host = (*self._no_rows(size), np.int32(0), *[np.False_] * (name == "speculate"))

        def call(weights, state, *host):
            model, draft = jax.tree.unflatten(self._structure, weights)
            return self._large(name, model, draft)(state, *host)

        # Threads have no mesh of their own.
        with jax.set_mesh(self.mesh):
            state: Any = abstract(functools.partial(self._empty, num_pages), self.mesh)
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
            return functools.partial(speculate, model, draft, config=self.config)
        if name == "read":
            both = functools.partial(read_both, model, draft)
            return both if self.speculates else functools.partial(read, model)
        program = decode_noting if self.speculates else decode
        return functools.partial(program, model, burst=self.config.burst)

    def _room(self) -> int:
        """Pages of each shard: what the largest programs leave of a device's memory.

        At most all that `max_num_seqs` sequences of full length need.
        """

        def held(num_pages: int) -> int:
            """Bytes of each device."""
            leaves = jax.tree.leaves(abstract(lambda: self._empty(num_pages), self.mesh))
            return sum(
                math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
            )

        page = held(2) - held(1)
        device = jax.local_devices()[0]
        memory = device.memory_stats() or {}
        room = DEFAULT_KV_BYTES
        if "bytes_limit" in memory:
            batches = {self._batch_size(n) for n in range(1, self.slots_per_shard + 1)}
            last: dict[str, Key] = {self._kind(n): (self._kind(n), n) for n in sorted(batches)}
            largest: list[Key] = [("read", self.config.prefill_chunk), *last.values()]
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
