"""The programs of the engine: in place, of any burst length, and as many pages as there is room."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from small_model import CONFIG, EIGHT, ONE, make, mesh_of

from jaxgen.errors import UserError
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.core import EngineCore
from jaxgen.serve.plan import Burst
from jaxgen.serve.request import Request, SamplingConfig

SMALL = EngineConfig(max_num_seqs=8, prefill_chunk=16, kv_blocks=40)


def core_of(mesh, config=SMALL):
    with jax.set_mesh(mesh_of(mesh)):
        return EngineCore(make(), config)


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_programs_write_the_state_in_place(mesh):
    core = core_of(mesh)
    runner = core.runner
    requests = [Request((5, n), SamplingConfig(max_tokens=30)) for n in range(5)]
    for request in requests:
        core.submit(request)
    core.step()
    core.step()

    def on_one_device(tree):
        return [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]

    def places():
        kept = (runner.state.layers, runner.state.vocab)
        return {array.unsafe_buffer_pointer() for array in on_one_device(kept)}

    assert {name for name, _ in runner.lattice.programs} == {"read", "decode"}
    before, where = runner.state, places()
    core.step()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert places() == where
    size = sum(shard.nbytes for shard in on_one_device(runner.state))
    shape = on_one_device(runner.state.layers)[0].shape
    rows = f"[{runner.lattice.slots_per_shard * runner.lattice.shards + 1},{CONFIG.vocab_size}]"
    for program in runner.lattice.programs.values():
        assert program.memory_analysis().alias_size_in_bytes >= size
        # Nor does the loop copy its carry on the way.
        text = program.as_text()
        pages = f"f32[{','.join(map(str, shape))}]"
        assert pages in text
        copies = [line for line in text.splitlines() if " copy(" in line]
        assert rows in text
        assert not [line for line in copies if pages in line or rows in line]


def test_bursts_of_any_length_are_one_program_and_give_the_same_tokens():
    answers = []
    for burst in (8, 5, 1):
        core = core_of(ONE)
        core.scheduler.burst = burst
        request = Request((1, 2, 3), SamplingConfig(max_tokens=40, temperature=1.0))
        core.run([request], lambda done: None)
        answers.append(request.output)
        assert sorted(core.runner.lattice.programs) == [("decode", 1), ("read", 16)]
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 40


def test_a_burst_ends_with_its_last_row():
    core = core_of(ONE)
    runner = core.runner
    request = Request((1, 2, 3), SamplingConfig(max_tokens=4))
    core.submit(request)
    core.step()
    (row,) = core.scheduler.rows
    delivery = runner._decode(Burst([row], 8))
    ((_, tokens, _),) = delivery.fetch()
    assert len(tokens) == 3
    assert bool(runner.state.slots.done[row.slot])
    assert int(runner.state.slots.positions[row.slot]) == 6
    ((_, tokens, _),) = runner._decode(Burst([row], 8)).fetch()
    assert tokens == []


@pytest.mark.parametrize(
    ("kv_dtype", "token_bytes"),
    [
        pytest.param("auto", 4 * CONFIG.head_dim, marks=pytest.mark.full),
        ("int8", CONFIG.head_dim + 4),
    ],
)
def test_pages_fill_the_memory_that_programs_leave(kv_dtype, token_bytes, monkeypatch):
    config = dataclasses.replace(SMALL, kv_blocks=None, kv_dtype=kv_dtype)
    every = core_of(ONE, config).runner.lattice.num_pages
    assert every == 8 * CONFIG.max_seq_len // 16 + 1
    device = type(jax.devices()[0])
    page = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * 16 * token_bytes

    def pages_with(limit):
        stats = {"bytes_limit": limit, "bytes_in_use": 1000}
        monkeypatch.setattr(device, "memory_stats", lambda self: stats)
        return core_of(ONE, config)

    core = pages_with(1 << 20)
    assert core.runner.lattice.compilations == 2
    programs = [core.runner.lattice.compile(key, 2) for key in (("read", 16), ("decode", 8))]
    needs = [program.memory_analysis() for program in programs]
    state = max(need.alias_size_in_bytes for need in needs)
    assert state > 9 * CONFIG.vocab_size * (SMALL.max_num_seqs + 1)
    own = [n.temp_size_in_bytes + n.output_size_in_bytes - n.alias_size_in_bytes for n in needs]
    needed = state + 2 * max(own)
    limit = 1000 + needed + 20 * page
    assert [pages_with(limit + n).runner.lattice.num_pages for n in (-1, 0, page)] == [19, 20, 21]
    with pytest.raises(UserError, match=r"leave 0 MiB of a device .* use --engine\.weights int8"):
        pages_with(1000 + needed)


def test_what_was_compiled_ahead_is_all_there_is(monkeypatch):
    core, shown = core_of(ONE, dataclasses.replace(SMALL, max_num_seqs=2)), []

    @contextlib.contextmanager
    def progress(what, total, *, in_bytes):
        shown.append((what, total, in_bytes))
        yield shown.append

    monkeypatch.setattr("jaxgen.serve.lattice.progress", progress)
    core.runner.compile_all()
    big = [("decode", 1), ("decode", 2), ("read", 16)]
    assert sorted(core.runner.lattice.programs) == sorted(
        [*big, ("shape", 1), ("mask", 1), ("mask", 2)]
    )
    assert shown == [("compiling 6 programs", 6, False), *range(1, 7)]
    del core.runner.lattice.programs["decode", 2]
    requests = [Request((n,), SamplingConfig(max_tokens=9)) for n in range(2)]
    with pytest.raises(AssertionError, match=r"\('decode', 2\) is not among the programs"):
        core.run(requests, lambda done: None)
    assert core.scheduler.idle
    assert np.all([pool.used == 0 for pool in core.pools])
