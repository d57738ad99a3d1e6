"""Published models have their published numbers of parameters, and divide over real meshes."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from jaxgen.models import presets
from jaxgen.models.decoder import Decoder
from jaxgen.nn.init import Elementwise
from jaxgen.sharding import AXES, Rules

# Preset -> (parameters, mesh). The models' own safetensors indices have them, but for two things:
# files of a tied model may hold the table twice (Qwen 3 up to 4B do), and those of Gemma 3 from 4B
# on hold a vision encoder of 416,866,032 and a projector of 1152 * (embed_dim + 1) besides.
PUBLISHED = {
    "LLAMA_3_1_8B": (8_030_261_248, {"fsdp": 16}),
    "LLAMA_3_1_70B": (70_553_706_496, {"fsdp": 16, "tensor": 8}),
    "LLAMA_3_1_405B": (405_853_388_800, {"fsdp": 128, "tensor": 8}),
    "LLAMA_3_2_1B": (1_235_814_400, {"fsdp": 8}),
    "LLAMA_3_2_3B": (3_212_749_824, {"fsdp": 4, "tensor": 2}),
    "SMOLLM2_135M": (134_515_008, {"fsdp": 4, "tensor": 3}),
    "SMOLLM2_360M": (361_821_120, {"fsdp": 8}),
    "SMOLLM2_1_7B": (1_711_376_384, {"fsdp": 4, "tensor": 4}),
    "MISTRAL_7B_V0_3": (7_248_023_552, {"fsdp": 8, "tensor": 4}),
    "MIXTRAL_8X7B": (46_702_792_704, {"fsdp": 16, "expert": 8}),
    "MIXTRAL_8X22B": (140_620_634_112, {"fsdp": 16, "tensor": 2, "expert": 8}),
    "QWEN2_5_0_5B": (494_032_768, {"fsdp": 4, "tensor": 2}),
    "QWEN2_5_7B": (7_615_616_512, {"fsdp": 8, "tensor": 4}),
    "QWEN3_0_6B": (596_049_920, {"fsdp": 4, "tensor": 8}),
    "QWEN3_1_7B": (1_720_574_976, {"fsdp": 8}),
    "QWEN3_4B": (4_022_468_096, {"fsdp": 8}),
    "QWEN3_8B": (8_190_735_360, {"fsdp": 16, "tensor": 4}),
    "QWEN3_14B": (14_768_307_200, {"fsdp": 16, "tensor": 8}),
    "QWEN3_32B": (32_762_123_264, {"fsdp": 32, "tensor": 8}),
    "QWEN3_30B_A3B": (30_532_122_624, {"fsdp": 8, "expert": 16}),
    "QWEN3_235B_A22B": (235_093_634_560, {"fsdp": 8, "tensor": 4, "expert": 16}),
    "GEMMA_3_270M": (268_098_176, {"fsdp": 8}),
    "GEMMA_3_1B": (999_885_952, {"fsdp": 8}),
    "GEMMA_3_4B": (4_300_079_472 - 416_866_032 - 1152 * 2561, {"fsdp": 8, "tensor": 4}),
    "GEMMA_3_12B": (12_187_325_040 - 416_866_032 - 1152 * 3841, {"fsdp": 8, "tensor": 8}),
    "GEMMA_3_27B": (27_432_406_640 - 416_866_032 - 1152 * 5377, {"fsdp": 16, "tensor": 8}),
    "OLMO_2_7B": (7_298_617_344, {"fsdp": 8, "tensor": 4}),
    "PHI_3_MINI_4K": (3_821_079_552, {"fsdp": 8, "tensor": 4}),
}
# 12.9, 39, 3.3 and 22 billion in the papers.
ACTIVE = {
    "MIXTRAL_8X7B": 12_879_925_248,
    "MIXTRAL_8X22B": 39_152_031_744,
    "QWEN3_30B_A3B": 3_353_032_704,
    "QWEN3_235B_A22B": 22_190_763_520,
}


def test_every_preset_is_listed():
    assert PUBLISHED.keys() == {name for name in vars(presets) if name.isupper()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_parameters(name):
    config = getattr(presets, name)
    (params, sizes), seq_len = PUBLISHED[name], 8192
    active = ACTIVE.get(name, params)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    mesh = AbstractMesh(shape, AXES, (AxisType.Explicit,) * len(AXES))
    config.check_mesh(mesh, Rules().on(mesh))
    with jax.sharding.use_abstract_mesh(mesh):
        model = jax.eval_shape(lambda: Decoder(config, key=jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == params == config.num_params
    assert config.num_active_params == active
    # All but the lookup of embeddings and what scales or shifts.
    params = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    scales = [param.get_raw_value().size for param in params if isinstance(param, Elementwise)]
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    in_products = active - sum(scales) - looked_up
    # A key that is as far as the query counts half.
    before = np.arange(seq_len) + 0.5
    seen = [
        np.minimum(before, config.sliding_window if local else seq_len).mean()
        for local in config.local_layers
    ]
    scores = config.num_heads * config.head_dim * sum(seen)
    assert config.flops_per_token(seq_len) == 6 * in_products + 12 * scores
