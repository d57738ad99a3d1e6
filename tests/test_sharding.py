"""Meshes: sizes that fit and sizes that do not; rules: where each dimension goes on which mesh."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxgen.errors import UserError
from jaxgen.sharding import AXES, MeshConfig, Rules, make_mesh


@pytest.mark.smoke
def test_the_rest_goes_to_the_axis_of_minus_one():
    assert MeshConfig(fsdp=-1, tensor=2).resolve(8).fsdp == 4
    assert MeshConfig(data=-1, fsdp=2).resolve(8).data == 4
    assert make_mesh(MeshConfig(data=2, tensor=4)).shape == {
        **dict.fromkeys(AXES, 1),
        "data": 2,
        "tensor": 4,
    }


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MeshConfig(tensor=3),
            "needs a multiple of 3 devices and there are 8; use mesh.data=1 mesh.fsdp=8",
        ),
        (
            MeshConfig(data=4, fsdp=4),
            "data=4 x fsdp=4 needs 16 devices and there are 8; use mesh.data=4",
        ),
        (MeshConfig(data=-1), "mesh.data and mesh.fsdp are both -1"),
        (MeshConfig(data=0), "mesh.data=0; use a positive number"),
    ],
    ids=["tensor3", "too_many", "two_rests", "zero"],
)
def test_a_mesh_that_does_not_fit_is_refused_with_one_that_does(config, message):
    with pytest.raises(UserError) as refused:
        config.resolve(8)
    assert message in str(refused.value)


@pytest.mark.smoke
def test_rules_drop_the_axes_of_one_device():
    rules = Rules()
    assert rules("embed", "mlp") == P(("fsdp", "context", "expert"), "tensor")
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        here = rules.here()
        assert here("embed", "mlp") == P("fsdp", "tensor")
        assert here("batch", "act_seq") == P("fsdp", "tensor")
        assert here("batch", "seq") == P("fsdp", None)
        assert here.gathered("embed", "mlp") == P(None, "tensor", reduced={"fsdp"})
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        here = rules.here()
        assert here.gathered("embed", "mlp") == P(None, None, reduced={"data", "fsdp"})
        assert here.gathered("embed", "mlp", over="data") == P("fsdp", None, reduced={"data"})


@pytest.mark.smoke
def test_rules_refuse_what_cannot_be():
    with pytest.raises(UserError, match=r"rules\.mlp='tensr': no mesh axis 'tensr'"):
        Rules(mlp="tensr")
    with pytest.raises(UserError, match="no logical axis 'width'"):
        Rules()("width")
    with pytest.raises(UserError, match=r"rules\.embed and rules\.mlp both split over .* 'fsdp'"):
        Rules(mlp="fsdp")("embed", "mlp")
