"""Runs the scheduler's plans: which program, with which arguments."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxgen.models.decoder import Decoder
from jaxgen.serve.cache import DecodeState
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.delivery import Delivery
from jaxgen.serve.drafts import check_draft
from jaxgen.serve.lattice import Key, Lattice
from jaxgen.serve.plan import Burst, Chunk, Plan, Row


class Runner:
    """A model on its devices, with the state of decoding.

    Make it inside the `jax.set_mesh(mesh)` of the model.

    Attributes:
        model: as `for_serving` made it.
        draft: likewise, if there is one.
        lattice: the compiled programs.
        state: of decoding, which every program replaces.
    """

    def __init__(self, model: Decoder, config: EngineConfig, draft: Decoder | None = None):
        """Compiles what it needs to find room for the pages, where devices state their memory."""
        check_draft(model, draft, config)
        self.model, self.config, self.draft = model, config, draft
        self.lattice = Lattice(model, draft, config)
        # A module is flattened by Python code: once, and not for every call.
        self._weights, self._structure = jax.tree.flatten((model, draft))
        make = jax.jit(self.lattice.empty, static_argnums=0)
        self.state: DecodeState = make(self.lattice.num_pages)

    def compile_all(self) -> None:
        """Compiles the whole lattice; from now on nothing is compiled, whatever comes."""
        self.lattice.compile_all(self.lattice.keys)
        self.lattice.sealed = True

    def compile_for(self, num_requests: int) -> None:
        """Compiles the decoding of so many requests at once."""
        lattice = self.lattice
        per_shard = min(-(-num_requests // lattice.shards), lattice.slots_per_shard)
        sizes = {lattice.batch_size(per_shard)}
        if lattice.speculates:
            sizes.add(lattice.batch_size(min(per_shard, self.config.speculation_max_seqs)))
        lattice.compile_all([(lattice.kind(batch), batch) for batch in sizes])

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

    def replace(self, staged: list[jax.Array], moved: Callable[[], None]) -> None:
        """Takes other weights, all alike but for their values, out of a list of arrays anywhere.

        Nothing may run. Leaf by leaf: devices hold one of them besides the models.

        Args:
            staged: the model's, and then the draft model's unless those stay.
            moved: called after each.
        """
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self._weights]
        shardings = [leaf.sharding for leaf in self._weights[: len(staged)]]
        # Without arrays, which would be owned once more.
        self.model, self.draft = jax.tree.unflatten(self._structure, shapes)
        for i, sharding in enumerate(shardings):
            self._weights[i] = None
            self._weights[i] = jax.block_until_ready(jax.device_put(staged.pop(0), sharding))
            moved()
        self.model, self.draft = jax.tree.unflatten(self._structure, self._weights)

    def _read(self, chunks: list[Chunk]) -> Delivery:
        size = self.lattice.chunk_size(max(chunk.size for chunk in chunks))
        args = self.lattice.no_chunks(size)
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
        if self.lattice.speculates:
            length = self.model.config.max_seq_len
            tokens = np.zeros(length, np.int32)
            tokens[: len(row.tokens)] = row.tokens
            self._write(("note", length), np.int32(row.slot), tokens)

    def _shape(self, row: Row) -> None:
        """Tells the device of a row's bias and of the tokens it has, if it has to know."""
        request = row.request
        if not request.sampling.shapes:
            return
        _, bias, prompt, counts = self.lattice.no_shape()
        for token, value in request.sampling.logit_bias:
            bias[token] = value
        prompt[list(request.prompt)] = True
        np.add.at(counts, request.output, 1)
        self._write(("shape", 1), np.int32(row.slot), bias, prompt, counts)

    def _mask(self, rows: list[Row]) -> None:
        """Tells the device what can be drawn next in some rows."""
        if not rows:
            return
        slots, masks = self.lattice.no_masks(1 << (len(rows) - 1).bit_length())
        for at, row in enumerate(rows):
            slots[at], mask = row.slot, row.request.mask
            masks[at] = row.request.lengthened(masks[at]) if mask is None else mask
        self._write(("mask", len(slots)), slots, masks)

    def _decode(self, burst: Burst) -> Delivery:
        by_shard = [
            [row for row in burst.rows if row.shard == s] for s in range(self.lattice.shards)
        ]
        batch = self.lattice.batch_size(max(map(len, by_shard)))
        if not self.lattice.sealed:
            # A larger batch costs less than a compilation, as the last requests of many end.
            kinds = ("speculate",) if burst.width > 1 else ("decode", "speculate")
            ready = [n for kind, n in self.lattice.programs if kind in kinds and n >= batch]
            batch = min(ready, default=batch)
        kind = self.lattice.kind(batch)
        table, slots = self.lattice.no_rows(batch)
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
        self.state, *came = self.lattice.compiled(key)(self._weights, self.state, *args)
        return came

    def _write(self, key: Key, *args: Any) -> None:
        program, state = self.lattice.compiled(key), self.state
        if key[0] != "note":
            self.state = state._replace(vocab=program(state.vocab, *args))
        elif state.drafts is not None:
            history = program(state.drafts.history, *args)
            self.state = state._replace(drafts=state.drafts._replace(history=history))
