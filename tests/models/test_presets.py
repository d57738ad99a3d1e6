"""Published models have their published numbers of parameters, and divide over real meshes."""

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from jaxgen.models import presets
from jaxgen.models.decoder import Decoder
from jaxgen.nn.init import Elementwise
from jaxgen.sharding import AXES, Rules

# Preset -> (parameters, of which a token meets, mesh). The models' own safetensors indices have the
# first; the second are 12.9, 39, 3.3 and 22 billion in the papers.
PUBLISHED = {
    "LLAMA_3_1_8B": (8_030_261_248, 8_030_261_248, {"fsdp": 16}),
    "LLAMA_3_1_70B": (70_553_706_496, 70_553_706_496, {"fsdp": 16, "tensor": 8}),
    "LLAMA_3_1_405B": (405_853_388_800, 405_853_388_800, {"fsdp": 128, "tensor": 8}),
    "MIXTRAL_8X7B": (46_702_792_704, 12_879_925_248, {"fsdp": 16, "expert": 8}),
    "MIXTRAL_8X22B": (140_620_634_112, 39_152_031_744, {"fsdp": 16, "tensor": 2, "expert": 8}),
    "QWEN3_30B_A3B": (30_532_122_624, 3_353_032_704, {"fsdp": 8, "expert": 16}),
    "QWEN3_235B_A22B": (235_093_634_560, 22_190_763_520, {"fsdp": 8, "tensor": 4, "expert": 16}),
}


def test_every_preset_is_listed():
    assert PUBLISHED.keys() == {name for name in vars(presets) if name.isupper()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_parameters(name):
    config = getattr(presets, name)
    params, active, sizes = PUBLISHED[name]
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    mesh = AbstractMesh(shape, AXES, (AxisType.Explicit,) * len(AXES))
    config.check_mesh(mesh, Rules().on(mesh))
    with jax.sharding.use_abstract_mesh(mesh):
        model = jax.eval_shape(lambda: Decoder(config, key=jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == params == config.num_params
    assert config.num_active_params == active
    # All but the lookup of embeddings and what scales or shifts; half of 8,192 keys are seen.
    params = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    scales = [param.get_raw_value().size for param in params if isinstance(param, Elementwise)]
    in_products = active - sum(scales) - config.vocab_size * config.embed_dim
    scores = config.num_layers * config.num_heads * config.head_dim * 4096
    assert config.flops_per_token(8192) == 6 * in_products + 12 * scores
