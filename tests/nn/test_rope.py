"""Rotary embeddings against the published definitions, written here once more for one pair."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.rope import RopeScaling, frequencies, rotate, rotation


def plain(head_dim, theta):
    return [1.0 / theta ** (2 * i / head_dim) for i in range(head_dim // 2)]


def llama3(freq, s):
    """Source: `_compute_llama3_parameters` in Hugging Face transformers, for one frequency."""
    wave = 2 * math.pi / freq
    if wave < s.original_max_seq_len / s.high_freq_factor:
        return freq
    if wave > s.original_max_seq_len / s.low_freq_factor:
        return freq / s.factor
    span = s.high_freq_factor - s.low_freq_factor
    smooth = (s.original_max_seq_len / wave - s.low_freq_factor) / span
    return (1 - smooth) * freq / s.factor + smooth * freq


def yarn(head_dim, theta, s):
    """Source: `_compute_yarn_parameters` in Hugging Face transformers."""

    def correction(turns):
        length = s.original_max_seq_len / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low = max(math.floor(correction(s.beta_fast)), 0)
    high = min(math.ceil(correction(s.beta_slow)), head_dim - 1)
    result = []
    for i, freq in enumerate(plain(head_dim, theta)):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        result.append(freq / s.factor * ramp + freq * (1 - ramp))
    return result


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 500_000.0), (64, 10_000.0), (8, 100.0)])
def test_frequencies_are_those_of_the_published_definitions(head_dim, theta):
    np.testing.assert_allclose(frequencies(head_dim, theta)[0], plain(head_dim, theta), rtol=1e-6)

    linear = RopeScaling(kind="linear", factor=4.0)
    expected = np.array(plain(head_dim, theta)) / 4
    np.testing.assert_allclose(frequencies(head_dim, theta, linear)[0], expected, rtol=1e-6)

    three = RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=512)
    expected = [llama3(freq, three) for freq in plain(head_dim, theta)]
    freq, factor = frequencies(head_dim, theta, three)
    np.testing.assert_allclose(freq, expected, rtol=1e-6)
    assert factor == 1.0

    long = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=512)
    freq, factor = frequencies(head_dim, theta, long)
    np.testing.assert_allclose(freq, yarn(head_dim, theta, long), rtol=1e-6)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)


def test_llama3_keeps_fast_waves_and_divides_slow_ones():
    """Llama 3.1: factor 8, 8192 positions, head dim 128, theta 500,000."""
    freq = frequencies(128, 5e5)[0]
    scaled = frequencies(128, 5e5, RopeScaling(kind="llama3", factor=8.0))[0]
    ratio = scaled / freq
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(1 / 8)
    assert np.all(np.diff(ratio) <= 1e-6)
    assert np.any((ratio > 0.13) & (ratio < 0.99))


def test_yarn_takes_the_attention_factor_it_is_given():
    given = RopeScaling(kind="yarn", factor=4.0, attention_factor=1.5)
    cos, sin = rotation(jnp.zeros((1, 1), jnp.int32), 8, 100.0, given)
    np.testing.assert_allclose(cos, 1.5)
    np.testing.assert_allclose(sin, 0.0)


def test_rotation_is_a_product_of_complex_numbers():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 1000, 5]])
    turned = rotate(jnp.asarray(x), rotation(jnp.asarray(positions, jnp.int32), 8, 100.0))
    angle = positions[:, :, None, None] * np.array(plain(8, 100.0))
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    expected = np.concatenate([expected.real, expected.imag], axis=-1)
    np.testing.assert_allclose(turned, expected, atol=2e-4)


def test_positions_far_out_stay_apart_in_bfloat16():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    near = rotate(x, rotation(jnp.array([[256, 257]], jnp.int32), 8, 100.0))
    assert near.dtype == jnp.bfloat16
    assert not np.array_equal(near[0, 0], near[0, 1])
