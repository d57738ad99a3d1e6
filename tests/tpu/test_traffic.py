"""What a step sends over each mesh axis, in the TPU compiler's programs, is what theory says.

The formulas are written here as they are there: bytes that each device sends in one step, by the
bandwidth-optimal algorithm of each collective.
"""

import collections
import dataclasses
import functools

import pytest

from jaxgen.config import TrainConfig
from jaxgen.data.config import DataConfig
from jaxgen.models.config import ComputeConfig, DecoderConfig
from jaxgen.nn.router import MoEConfig
from jaxgen.plan.hlo import Program
from jaxgen.sharding import MeshConfig, Rules, make_mesh
from jaxgen.train.loop import LoopConfig
from jaxgen.train.program import compile_step

pytestmark = [pytest.mark.tpu_compile, pytest.mark.full]

MODEL = DecoderConfig(
    vocab_size=32_768,
    num_layers=4,
    embed_dim=1024,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=4096,
    max_seq_len=2048,
)
ROWS, TOKENS, SIZE = 8, 2048, 2


def share(devices):
    """What a device sends of an array that is gathered from, or scattered over, so many devices."""
    return (devices - 1) / devices


def dense_width(model):
    return 0 if model.moe else model.mlp_dim


def weights(model):
    """Bytes of all layers' matrices but experts, and of one table of the vocabulary, in bf16."""
    D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
    layer = D * (2 * N + 2 * K) * H + 3 * D * dense_width(model)
    return SIZE * model.num_layers * layer, SIZE * model.vocab_size * D


def fsdp(model, devices):
    layers, table = weights(model)
    vectors = SIZE * ROWS // devices * TOKENS * model.embed_dim
    return {
        "all-gather": share(devices) * (2 * layers + table),
        "reduce-scatter": share(devices) * (layers + table),
        "all-to-all": share(devices) * 2 * vectors,
    }


def data(model, devices):
    layers, table = weights(model)
    return {"all-reduce": 2 * share(devices) * (layers + 2 * table)}


def tensor(model, devices):
    stream = share(devices) * SIZE * ROWS * TOKENS * model.embed_dim
    return {
        "all-gather": stream * (6 * model.num_layers + 2),
        "reduce-scatter": stream * (5 * model.num_layers + 2),
    }


def context(model, devices):
    keys_values = 2 * SIZE * ROWS * TOKENS // devices * model.num_kv_heads * model.head_dim
    hops = 4 * devices - 5
    return fsdp(model, devices) | {"collective-permute": hops * model.num_layers * keys_values}


def reduced_whole(model, devices):
    """Gradients that the compiler does not scatter but reduces and slices, twice the bytes: of the
    matrices whose columns are split, which are output projections and the head."""
    D, N, H = model.embed_dim, model.num_heads, model.head_dim
    return (
        share(devices)
        * SIZE
        * D
        * (model.vocab_size + model.num_layers * (N * H + dense_width(model)))
    )


def gather_once(model, devices):
    layers, table = weights(model)
    found = fsdp(model, devices)
    return found | {
        kind: share(devices) * (layers + table) for kind in ("all-gather", "reduce-scatter")
    }


def context_gathered(model, devices):
    keys_values = 2 * SIZE * ROWS * TOKENS * model.num_kv_heads * model.head_dim
    found = fsdp(model, devices)
    found["all-gather"] += 2 * share(devices) * model.num_layers * keys_values
    found["reduce-scatter"] += share(devices) * model.num_layers * keys_values
    return found


def pipeline(model, devices):
    stream = SIZE * ROWS * TOKENS * model.embed_dim
    microbatch = stream / devices
    ticks = 2 * devices - 1
    return {
        "all-gather": share(devices) * 2 * stream,
        "reduce-scatter": share(devices) * 2 * stream,
        "collective-permute": 4 * ticks * microbatch,
    }


def expert(model, devices):
    stream = share(devices) * SIZE * ROWS * TOKENS * model.embed_dim
    found = fsdp(model, devices)
    found["all-gather"] += 3 * stream * model.num_layers
    found["reduce-scatter"] += 2 * stream * model.num_layers
    return found


def expert_sent(model, devices, capacity=None):
    """By all_to_all: a device has room for a part of all tokens."""
    stream = share(devices) * SIZE * ROWS * TOKENS * model.embed_dim
    per_token, local = model.moe.num_experts_per_tok, model.moe.num_experts / devices
    room = min(per_token, local, (capacity or devices) * per_token / devices)
    found = fsdp(model, devices)
    found["all-to-all"] += 5 * room * stream * model.num_layers
    return found


DEEP = dataclasses.replace(MODEL, num_layers=8)
EXPERTS = dataclasses.replace(
    MODEL, mlp_dim=1024, moe=MoEConfig(num_experts=8, num_experts_per_tok=2)
)
RULES, ZERO_1 = Rules(), Rules(embed=("fsdp", "data"))
# Of an axis, by how it is used: the model, what is set besides, and the formula.
CASES = {
    "fsdp": (MODEL, {}, fsdp),
    "fsdp gather_once": (MODEL, {"gather_once": "fsdp"}, gather_once),
    "data": (MODEL, {}, data),
    "data gather_once": (MODEL, {"gather_once": "data", "rules": ZERO_1}, gather_once),
    "tensor": (MODEL, {}, tensor),
    "context ring": (MODEL, {}, context),
    "context all_gather": (MODEL, {"context_attention": "all_gather"}, context_gathered),
    "pipeline": (DEEP, {}, pipeline),
    "expert all_gather": (EXPERTS, {}, expert),
    "expert all_to_all": (EXPERTS, {"expert_dispatch": "all_to_all"}, expert_sent),
    "expert capacity": (
        EXPERTS,
        {"expert_dispatch": "all_to_all", "expert_capacity": 1.5},
        functools.partial(expert_sent, capacity=1.5),
    ),
}


def sent(compiled, mesh):
    """Bytes that a device sends over each axis: {axis: {kind: bytes}}."""
    found = collections.defaultdict(collections.Counter)
    for collective in Program(compiled.as_text()).collectives():
        axes = "+".join(collective.axes(mesh.shape))
        found[axes][collective.kind] += collective.wire_bytes
    return found


def step(mesh_config, model, devices, rows=ROWS, rules=RULES, **compute):
    config = TrainConfig(
        name="traffic",
        model=model,
        data=DataConfig(),
        mesh=mesh_config,
        rules=rules,
        compute=ComputeConfig(**compute),
        train=LoopConfig(batch_size=rows, seq_len=TOKENS),
    )
    mesh = make_mesh(mesh_config, devices=devices)
    return compile_step(config, mesh), mesh


@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_what_theory_says(case, describe):
    axis, (model, more, formula) = case.split()[0], CASES[case]
    config = MeshConfig(**{"fsdp": 1, axis: 8})
    compiled, mesh = step(config, model, describe("v5e:2x4"), **more)
    found, expected = sent(compiled, mesh), formula(model, 8)
    assert set(found) == {axis}
    found = found[axis]
    if "all-to-all" in expected:  # What is split as by fsdp.
        assert found["all-reduce"] == pytest.approx(2 * reduced_whole(model, 8), rel=0.05)
        found["reduce-scatter"] += found.pop("all-reduce") / 2
    for kind in {*found, *expected}:
        unexpected = 0.001 * sum(expected.values())
        assert found[kind] == pytest.approx(expected.get(kind, 0), rel=0.05, abs=unexpected)
