"""The HLO reader, on programs compiled here and on lines as the TPU compiler writes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxgen.plan.hlo import Program
from jaxgen.sharding import MeshConfig, make_mesh

# A loop of 32 in which one gather runs beside two fusions, one does not, and a reduction takes two
# arrays at once.
TPU_TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add.0 = bf16[] add(%a, %b)
}

%start (p: bf16[256,128]) -> (bf16[256,128], bf16[4096,128], u32[]) {
  %p = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[4096,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, \
replica_groups=mesh['a'=4,'b'=4] {'a','b'}, dimensions={0}, frontend_attributes={chain_id="0"}, \
metadata={op_name="jit(step)/while/body/gather"}
  ROOT %custom-call.1 = (bf16[256,128]{1,0}, bf16[4096,128]{1,0}, u32[]{:S(2)}) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[256,128]) -> bf16[4096,128] {
  %p.1 = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[4096,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=3, \
replica_groups=mesh['a'=4,'b'=4] {'a','b'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%body (s: (s32[], bf16[256,128])) -> (s32[], bf16[256,128]) {
  %s = (s32[]{:T(128)}, bf16[256,128]{1,0}) parameter(0)
  %x = bf16[256,128]{1,0} get-tuple-element(%s), index=1
  %begin = (bf16[256,128]{1,0}, bf16[4096,128]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, \
calls=%start
  %end = bf16[4096,128]{1,0} fusion(%x), kind=kCustom, calls=%done
  %all-gather.3 = f32[4096]{0} all-gather(%x), channel_id=4, replica_groups=[2,8]<=[16], \
dimensions={0}
  %all-reduce.1 = (bf16[64]{0}, /*index=1*/bf16[128,2]{1,0}) all-reduce(%x, %x), channel_id=5, \
replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, bf16[256,128]{1,0}) tuple(%x, %x)
}

%condition (s.1: (s32[], bf16[256,128])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(32)
  %s.1 = (s32[]{:T(128)}, bf16[256,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.9), direction=LT
}

ENTRY %main (p.9: bf16[256,128]) -> bf16[256,128] {
  %p.9 = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %init = (s32[]{:T(128)}, bf16[256,128]{1,0}) tuple(%p.9, %p.9)
  %while.1 = (s32[]{:T(128)}, bf16[256,128]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = bf16[256,128]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_what_the_tpu_compiler_writes():
    gather, sync, first, second = Program(TPU_TEXT).collectives()
    assert (gather.kind, gather.dtype, gather.num_bytes) == ("all-gather", "bf16", 4096 * 128 * 2)
    assert (gather.group_size, gather.trips, gather.asynchronous) == (16, 32, True)
    assert gather.op_name == "jit(step)/while/body/gather"
    assert gather.wire_bytes == 32 * 4096 * 128 * 2 * 15 / 16
    assert (sync.dtype, sync.num_bytes, sync.group_size) == ("f32", 4096 * 4, 8)
    assert (sync.asynchronous, sync.trips) == (False, 32)
    assert [c.num_bytes for c in (first, second)] == [128, 512]
    assert (first.kind, first.group_size, first.wire_bytes) == (
        "all-reduce",
        4,
        32 * 128 * 2 * 0.75,
    )


def test_the_axes_of_a_group_are_those_its_devices_differ_in():
    gather, sync, first, _ = Program(TPU_TEXT).collectives()
    mesh = {"data": 2, "fsdp": 2, "tensor": 4}
    assert gather.axes(mesh) == ("data", "fsdp", "tensor")
    assert sync.group == tuple(range(8))
    assert sync.axes(mesh) == ("fsdp", "tensor")
    assert first.axes(mesh) == ("tensor",)
    strided = TPU_TEXT.replace("[2,8]<=[16]", "[8,2]<=[2,8]T(1,0)")
    assert Program(strided).collectives()[1].axes(mesh) == ("data",)
    turned = TPU_TEXT.replace("'b'=4] {'a','b'}", "'b'=4], device_ids=([4,4]T(1,0)) {'a'}")
    assert Program(turned).collectives()[0].axes(mesh) == ("tensor",)


def test_a_fused_reduction_and_slice_is_a_reduce_scatter():
    fused = TPU_TEXT.replace("%start (p", "%all-reduce-scatter.4 (p").replace("calls=%start", "x=y")
    fused = fused.replace("calls=%done", "calls=%all-reduce-scatter.4")
    fused = fused.replace("all-gather(%p), channel_id=3", "all-reduce(%p), channel_id=3")
    first = Program(fused).collectives()[0]
    assert (first.kind, first.num_bytes) == ("reduce-scatter", 4096 * 128 * 2)
    assert first.wire_bytes == 32 * 4096 * 128 * 2 * 15 / 16


def test_a_permutation_runs_over_the_axis_it_shifts():
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=4))):

        def shift(x):
            return lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)])

        shifted = jax.shard_map(shift, in_specs=P("tensor"), out_specs=P("tensor"))
        x = jax.device_put(jnp.zeros((8, 16)), P("tensor"))
        (moved,) = Program(jax.jit(shifted).lower(x).compile().as_text()).collectives()
    assert (moved.kind, moved.wire_bytes) == ("collective-permute", 2 * 16 * 4)
    assert len(moved.pairs) == 8
    assert moved.axes({"fsdp": 2, "tensor": 4}) == ("tensor",)


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match=r"while\.1"):
        Program(TPU_TEXT.replace("direction=LT", "direction=NE")).collectives()


def test_text_of_something_else_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("module @jit_step {}").collectives()


def test_gathers_and_reductions_of_a_scan_compiled_here():
    """Five layers of weights split over eight devices: two gathers and one reduction a layer."""
    layers, width = 5, 64
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=8))):
        weights = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
        x = jax.ShapeDtypeStruct((16, width), jnp.float32)

        @jax.jit
        def step(weights, x):
            weights = reshard(weights, P(None, "fsdp", None))
            x = reshard(x, P("fsdp", None))

            @jax.checkpoint
            def body(x, w):
                whole = reshard(w, P(None, None, reduced={"fsdp"}))
                return jnp.tanh(x @ whole), None

            def loss(weights):
                return lax.scan(body, x, weights)[0].sum()

            return jax.grad(loss)(weights)

        compiled = step.lower(weights, x).compile()
    big = [c for c in Program(compiled.as_text()).collectives() if c.num_bytes >= width * width * 4]
    assert {c.trips for c in big} == {layers}
    assert {c.group_size for c in big} == {8}
    gathers = [c for c in big if c.kind == "all-gather"]
    reductions = [c for c in big if c.kind in ("all-reduce", "reduce-scatter")]
    assert [c.num_bytes for c in gathers] == [width * width * 4] * 2
    assert [c.num_bytes for c in reductions] == [width * width * 4]


def test_a_program_on_one_device_exchanges_nothing():
    compiled = jax.jit(lambda x: jnp.cumsum(x @ x)).lower(np.ones((4, 4), np.float32)).compile()
    assert Program(compiled.as_text()).collectives() == []
