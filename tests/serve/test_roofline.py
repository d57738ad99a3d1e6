"""What a decoding step has to read, counted in two ways, and what becomes of it over time."""

import dataclasses

import jax
import pytest
from small_model import CONFIG, EIGHT, ONE, make, mesh_of

from jaxgen.nn.router import MoEConfig
from jaxgen.peaks import Peak
from jaxgen.serve import roofline
from jaxgen.serve.blocks import Chain
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.engine import Engine
from jaxgen.serve.plan import Row
from jaxgen.serve.request import Request, SamplingConfig
from jaxgen.serve.roofline import DecodeMeter, StepCost
from jaxgen.serve.runner import Runner
from jaxgen.serve.weights import for_serving

TABLE = CONFIG.vocab_size * CONFIG.embed_dim
SMALL = EngineConfig(max_num_seqs=4, prefill_chunk=16, block_size=8, kv_blocks=7)


def cost_of(config, mesh):
    with jax.set_mesh(mesh_of(mesh)):
        runner = Runner(for_serving(make(config)), SMALL)
        return StepCost.of(runner.model, runner.state.layers, runner.lattice.num_pages * 8)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_all_parameters_but_a_table_that_is_looked_up_in(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    cost = cost_of(config, ONE)
    assert cost.weights == 4 * (config.num_params - (0 if tied else TABLE))
    assert cost.experts == 0
    # K and V of two kv heads of 8 numbers of 4 bytes.
    assert cost.kv == 2 * 2 * 8 * 4
    assert cost.windows == (6, None)


def test_a_device_of_a_mesh_has_its_part_of_heads_and_widths():
    one, cost = cost_of(CONFIG, ONE), cost_of(CONFIG, EIGHT)
    # Norms alone are whole on both devices of `tensor`; all else is split, and nothing over `fsdp`.
    norms = 4 * (2 * 2 + 1) * CONFIG.embed_dim
    assert cost.weights == (one.weights - norms) / 2 + norms
    assert cost.kv == one.kv / 2
    # Of a row, which is of one of four shards.
    assert cost.flops == one.flops / 2


def test_experts_count_as_far_as_tokens_reach_them():
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, shared_mlp_dim=16)
    cost = cost_of(dataclasses.replace(CONFIG, moe=moe), ONE)
    config = dataclasses.replace(CONFIG, moe=moe)
    experts = 2 * 4 * 3 * config.embed_dim * config.mlp_dim
    assert cost.experts == 4 * experts
    assert cost.weights == 4 * (
        config.num_params - experts - (0 if config.tie_embeddings else TABLE)
    )
    cost = dataclasses.replace(cost, kv=0.0)
    # One row reaches 2 of 4; of two, each expert is missed by both with probability 1/4.
    assert cost.work([[(5, 1)]]).bytes == cost.weights + cost.experts / 2
    assert cost.work([[(5, 1), (9, 1)]]).bytes == cost.weights + cost.experts * 3 / 4


def test_a_burst_is_its_steps():
    cost = StepCost(1000, 0, 0.0, (None, 6, 6), kv=10.0, flops=7.0, flops_seen=3.0)
    shards = [[(4, 3), (20, 1)], [(5, 4)], []]
    seen = [0, 0, 0]
    for shard, rows in enumerate(shards):
        for length, steps in rows:
            for step in range(steps):
                seen[shard] += (length + step) + 2 * min(length + step, 6)
    # Four steps, as long as the longest row; keys and values of the busiest shard.
    assert cost.work(shards) == (4 * 1000 + max(seen) * 10, 4 * 7 + max(seen) * 3)
    assert cost.work([[], []]) == (0, 0)


def test_a_meter_counts_from_when_the_device_was_free(monkeypatch):
    now = 0.0
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: now)
    meter = DecodeMeter(
        StepCost(1000, 0, 0.0, (), 0.0, 1.0, 0.0), 1, Peak(flops=1e9, bytes_per_s=1e3)
    )
    assert meter.fraction is None

    def deliver(at, begun, tokens):
        nonlocal now
        now = at
        row = Row(Request((1, 2, 3)), 0, 0, [], Chain(8, b""), [1, 2, 3], read=3)
        meter.add([(row, [1] * tokens, [])], begun)

    deliver(10, 6.0, 2)  # Given at 6, to a device that was idle: 4 s for what takes 2.
    assert (meter.bytes, meter.seconds, meter.roofline_s, meter.fraction) == (2000, 4, 2, 0.5)
    deliver(15, None, 1)  # A prompt was read.
    deliver(23, 11.0, 4)  # Given before that was done, at 15.
    assert (meter.bytes, meter.seconds, meter.roofline_s, meter.fraction) == (6000, 12, 6, 0.5)
    deliver(24, 23.0, 0)  # All rows had ended.
    assert meter.seconds == 12
    for _ in range(roofline.RECENT):
        deliver(now + 1, float(now), 1)
    assert meter.fraction == 1
    unknown = DecodeMeter(StepCost(1000, 0, 0.0, (), 0.0, 1.0, 0.0), 1, None)
    assert (unknown.fraction, unknown.roofline_s) == (None, None)


def test_an_engine_counts_its_own_decoding():
    config = dataclasses.replace(SMALL, max_num_seqs=1)
    with jax.set_mesh(mesh_of(ONE)), Engine(make(), config=config) as engine:
        cost = engine._core.meter._cost
        # One prompt of one chunk; its first token comes from reading it, the others from bursts.
        (piece,) = engine.generate([[1, 2, 3]], SamplingConfig(max_tokens=20))
        stats = engine.stats()
        assert len(piece.tokens) == 20
        # The plan after the one that reads decodes already: nothing but that one reads.
        assert stats.decode_bytes == cost.work([[(4, 19)]]).bytes
        assert 0 < stats.decode_s < 20
        assert stats.decode_roofline_s is None
        assert stats.roofline_fraction is None
