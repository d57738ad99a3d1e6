"""Decoding with weights in int8: what is stored, on every mesh, and what is answered."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, EIGHT, ONE, make, mesh_of

from jaxgen.nn.init import Elementwise, Precise
from jaxgen.nn.quantized import Quantized
from jaxgen.nn.router import MoEConfig
from jaxgen.serve import weights
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.generate import Generator
from jaxgen.serve.request import SamplingConfig
from jaxgen.serve.weights import for_serving
from jaxgen.sharding import MeshConfig

TIED = dataclasses.replace(CONFIG, tie_embeddings=True, qkv_bias=True)
MOE = dataclasses.replace(
    CONFIG,
    moe=MoEConfig(num_experts=4, num_experts_per_tok=2, shared_mlp_dim=16),
)
BY_EXPERT = (MeshConfig(data=2, expert=2, tensor=2), 8)


def is_param(leaf):
    return hasattr(leaf, "axes")


def params_of(model):
    return jax.tree.leaves(model, is_leaf=is_param)


def logits(model):
    tokens = np.arange(48, dtype=np.int32).reshape(8, 6) * 2
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (8, 6))
    spec = model.rules.here()("batch", "seq")
    rows = [jax.device_put(x, spec) for x in (tokens, positions, np.ones_like(tokens))]
    return np.asarray(jax.jit(lambda model, *rows: model(*rows))(model, *rows))


@pytest.fixture(scope="module", params=[TIED, MOE], ids=["dense", "experts"])
def alone(request):
    """A config, its model in int8 on one device, and its logits."""
    with jax.set_mesh(mesh_of(ONE)):
        model = for_serving(make(request.param), weights="int8")
        return request.param, model, logits(model)


def test_it_is_the_model_of_rounded_weights(alone):
    config, model, found = alone

    def read(param):
        value = param[...]
        if isinstance(value, Quantized):
            value = value.values.astype(jnp.float32) * value.scale
        return type(param)(value, axes=param.axes)

    with jax.set_mesh(mesh_of(ONE)):
        rounded = jax.tree.map(read, model, is_leaf=is_param)
        of_rounded = logits(rounded)
        exact = for_serving(make(config))
    # Sums of some 32 products in another order, layer after layer; logits are about 1.
    np.testing.assert_allclose(found, of_rounded, atol=1e-5)
    for param, whole in zip(params_of(model), params_of(exact), strict=True):
        value = param[...]
        if isinstance(param, Elementwise | Precise):
            np.testing.assert_array_equal(value, whole[...])
        else:
            off = np.asarray(value.values, np.float32) * value.scale - whole[...]
            assert np.all(np.abs(off) <= value.scale * (0.5 + 1e-5))


def test_weights_take_a_quarter_of_fp32(alone):
    config, model, _ = alone
    large = [param for param in params_of(model) if isinstance(param[...], Quantized)]
    for param in large:
        value = param[...]
        assert value.values.nbytes == value.values.size
        assert value.scale.nbytes == 4 * value.scale.size < value.values.nbytes
    small = config.num_params - sum(param[...].values.size for param in large)
    kept = [param for param in params_of(model) if not isinstance(param[...], Quantized)]
    assert sum(param[...].size for param in kept) == small
    assert all(isinstance(param, Elementwise | Precise) for param in kept)


@pytest.mark.parametrize(
    ("mesh", "fits"), [(EIGHT, True), (BY_EXPERT, False)], ids=["whole", "split"]
)
def test_a_mesh_computes_the_same(alone, mesh, fits, monkeypatch):
    config, model, expected = alone
    monkeypatch.setattr(weights, "_fits", lambda *_: fits)
    with jax.set_mesh(mesh_of(mesh)):
        split = for_serving(make(config), weights="int8")
        np.testing.assert_allclose(logits(split), expected, atol=1e-5)
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(split), strict=True):
        # Bit by bit: the largest of each channel is found over all devices.
        np.testing.assert_array_equal(one, other)


def live_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("stored", ["auto", "int8"])
def test_of_a_donated_model_no_more_is_kept_than_its_largest_stack(stored, monkeypatch):
    convert, peaks = weights.converted, []

    def watched(*args, **how):
        made = convert(*args, **how)
        peaks.append(live_bytes() - before)
        return made

    with jax.set_mesh(mesh_of(ONE)):
        expected = jax.tree.leaves(for_serving(make(TIED), weights=stored))
        before = live_bytes()
        model = make(TIED)
        size = live_bytes() - before
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(model))
        assert size > 3 * largest
        monkeypatch.setattr(weights, "converted", watched)
        found = jax.tree.leaves(for_serving(model, weights=stored, donate=True))
    assert max(peaks) <= size + largest
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_requests_are_served_as_each_is_alone():
    config = EngineConfig(max_num_seqs=4, prefill_chunk=16, kv_blocks=40, weights="int8")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in (1, 30, 7, 18, 3, 40)]
    samplings = [
        SamplingConfig(max_tokens=n, temperature=float(n % 2), seed=n)
        for n in (9, 14, 5, 20, 12, 7)
    ]
    with jax.set_mesh(mesh_of(ONE)):
        generator = Generator(make(TIED), config=config)
        together = generator(prompts, samplings)
        assert isinstance(generator.model.embedding[...], Quantized)
        for prompt, sampling, answer in zip(prompts, samplings, together, strict=True):
            assert generator([prompt], sampling) == [answer]
