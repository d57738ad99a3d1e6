"""Generation: the same tokens alone, in a batch, cached or not, on any mesh; where it stops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, EIGHT, ONE, make, mesh_of

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.nn.router import MoEConfig
from jaxgen.serve import weights
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.generate import Generator, generate, generate_text
from jaxgen.serve.request import SamplingConfig
from jaxgen.sharding import MeshConfig

GREEDY = SamplingConfig(max_tokens=9)
DRAWN = SamplingConfig(max_tokens=9, temperature=1.0, top_k=40, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def generator():
    with jax.set_mesh(mesh_of(ONE)):
        yield Generator(make())


def prompts_of(*lengths):
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]


RAGGED = prompts_of(3, 14, 1, 8, 11)


def test_greedy_tokens_are_those_of_the_full_forward(generator):
    prompts = RAGGED[:3]
    model = make()
    spec = model.rules.here()("batch", "seq")

    @jax.jit
    def likeliest(model, tokens, lengths):
        zeros = jnp.zeros_like(tokens)
        logits = model(tokens, zeros + jnp.arange(tokens.shape[1])[None, :], zeros + 1)
        is_last = jnp.arange(tokens.shape[1])[None, :] == lengths[:, None] - 1
        return jnp.sum(jnp.where(is_last, jnp.argmax(logits, axis=-1), 0), axis=1)

    rows = [list(prompt) for prompt in prompts]
    for _ in range(GREEDY.max_tokens):
        tokens = np.zeros((len(rows), 32), np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        lengths = np.asarray([len(ids) for ids in rows])
        for ids, token in zip(
            rows, np.asarray(likeliest(model, jax.device_put(tokens, spec), lengths)), strict=True
        ):
            ids.append(int(token))
    expected = [ids[len(prompt) :] for ids, prompt in zip(rows, prompts, strict=True)]
    assert generator(prompts, GREEDY) == expected


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_row_is_the_same_alone_and_in_a_ragged_batch(generator, sampling):
    together = generator(RAGGED, sampling)
    assert len({tuple(row) for row in together}) == len(RAGGED)
    for i in (1, 2):
        assert generator([RAGGED[i]], sampling) == [together[i]]
    assert generator(RAGGED[::-1], sampling) == together[::-1]


@pytest.mark.parametrize(
    "whole", [pytest.param(True, marks=pytest.mark.full), False], ids=["whole", "split"]
)
def test_a_mesh_gives_the_tokens_of_one_device(generator, whole, monkeypatch):
    monkeypatch.setattr(weights, "_fits", lambda *_: whole)
    samplings = [GREEDY, DRAWN, GREEDY, DRAWN, dataclasses.replace(DRAWN, seed=8)]
    expected = generator(RAGGED, samplings)
    with jax.set_mesh(mesh_of(EIGHT)):
        sharded = Generator(make())
        assert ("fsdp" in str(sharded.model.layers[0].mlp.up[...].sharding.spec)) is not whole
        assert sharded(RAGGED, samplings) == expected


CONTEXTS = {
    "2": (MeshConfig(context=2), 2),
    "4": (MeshConfig(context=4), 4),
    "8": (MeshConfig(context=8), 8),
    "product": (MeshConfig(data=2, context=2, tensor=2), 8),
}


@pytest.mark.parametrize(
    "mesh", [pytest.param(n, marks=[pytest.mark.full] * (n != "product")) for n in CONTEXTS]
)
def test_tokens_split_over_context_give_the_tokens_of_one_device(generator, mesh):
    """Rows of up to 120 tokens in 2 pages, of which a device has 32 tokens or fewer."""
    config, devices = CONTEXTS[mesh]
    prompts, samplings = prompts_of(3, 111, 40, 65), [GREEDY, GREEDY, DRAWN, DRAWN]
    block_size = 64 // config.context
    small = EngineConfig(max_num_seqs=4, prefill_chunk=16, block_size=block_size, kv_blocks=4)
    expected = generator(prompts, samplings)
    with jax.set_mesh(mesh_of((config, devices))):
        sharded = Generator(make(), config=small)
        assert sharded(prompts, samplings) == expected
    lines = sharded.core.runner.state.layers[0].k
    assert lines.addressable_shards[0].data.size == 5 * small.block_size * 2 // config.tensor * 8
    with jax.set_mesh(mesh_of(ONE)), pytest.raises(UserError, match="is more than the"):
        Generator(make(), config=dataclasses.replace(small, kv_blocks=1))(prompts[1:2], GREEDY)


def test_an_int8_cache_gives_a_row_what_it_gets_alone():
    """Of a prompt that is read in chunks, and of others beside it, on one device and on several."""
    prompts = prompts_of(3, 60, 8)
    samplings = [GREEDY, DRAWN, DRAWN]
    config = EngineConfig(max_num_seqs=4, kv_dtype="int8", prefill_chunk=16, kv_blocks=40)
    with jax.set_mesh(mesh_of(ONE)):
        one = Generator(make(), config=config)
        together = one(prompts, samplings)
        assert one(prompts[1:2], DRAWN) == together[1:2]
    assert one.core.runner.state.layers[0].k.dtype == jnp.int8
    with jax.set_mesh(mesh_of((MeshConfig(context=2, tensor=2), 4))):
        assert Generator(make(), config=config)(prompts, samplings) == together


EXPERTS = {
    "data": (MeshConfig(data=2, tensor=2, expert=2), "all_gather", True),
    "context": (MeshConfig(context=2, tensor=2, expert=2), "all_to_all", True),
    "whole": (MeshConfig(fsdp=2, tensor=2, expert=2), "all_gather", True),
    "split": (MeshConfig(fsdp=2, tensor=2, expert=2), "all_to_all", False),
}


@pytest.mark.parametrize(
    "mesh", [pytest.param(n, marks=[pytest.mark.full] * (n != "data")) for n in EXPERTS]
)
def test_experts_give_the_tokens_of_one_device(mesh, monkeypatch):
    """One token a row travels to its experts too, by either way."""
    config, dispatch, whole = EXPERTS[mesh]
    monkeypatch.setattr(weights, "_fits", lambda *_: whole)
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, shared_mlp_dim=16, router="sigmoid")
    experts = dataclasses.replace(CONFIG, moe=moe, num_layers=1, layer_pattern=("local",))
    samplings = [GREEDY, DRAWN, GREEDY, DRAWN, GREEDY]
    with jax.set_mesh(mesh_of(ONE)):
        expected = Generator(make(experts))(RAGGED, samplings)
    assert len({tuple(row) for row in expected}) == len(RAGGED)
    with jax.set_mesh(mesh_of((config, 8))):
        sharded = Generator(make(experts, dispatch=dispatch))
        spec = str(sharded.model.layers[0].mlp.up[...].sharding.spec)
        assert "expert" in spec
        assert ("fsdp" in spec) is not whole
        assert sharded(RAGGED, samplings) == expected


def test_seeds_decide_the_draws(generator):
    first = generator(RAGGED, DRAWN)
    assert generator(RAGGED, DRAWN) == first
    assert generator(RAGGED, dataclasses.replace(DRAWN, seed=8)) != first
    assert generator(RAGGED, GREEDY) != first


def test_a_row_stops_before_its_stop_id_and_at_its_own_budget(generator):
    full = generator(RAGGED, DRAWN)
    stop = full[0][4]
    cut = [row[: row.index(stop)] if stop in row else row for row in full]
    assert len(cut[0]) <= 4
    assert generator(RAGGED, DRAWN, [stop]) == cut
    samplings = [dataclasses.replace(DRAWN, max_tokens=n) for n in (1, 9, 3, 2, 5)]
    expected = [row[: s.max_tokens] for row, s in zip(full, samplings, strict=True)]
    assert generator(RAGGED, samplings) == expected


def test_the_copy_for_serving_is_in_the_asked_dtype():
    with jax.set_mesh(mesh_of(ONE)):
        model = make(dtype="bfloat16")
        assert weights.for_serving(model).dtype == jnp.float32  # On CPU.
        served = Generator(model, dtype="bfloat16")
        assert served.model.layers[1].mlp.up[...].dtype == jnp.bfloat16
        assert served.model.layers[1].mlp_norm.scale[...].dtype == jnp.float32
        assert model.layers.mlp.up[...].dtype == jnp.float32
        (row,) = served(RAGGED[:1], GREEDY)
        assert len(row) == GREEDY.max_tokens
        # A single bf16 row would be ten times slower than two on this platform.
        assert ("decode", 2) in served.core.runner.lattice.programs


def test_nothing_to_do(generator):
    assert generator([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "sampling", "line"),
    [
        ([[1], []], GREEDY, "prompt 1 has no tokens"),
        ([[1, 96]], GREEDY, "prompt 0 has token 96 and model.vocab_size=96"),
        ([[-1]], GREEDY, "prompt 0 has token -1 "),
        (
            [[1] * 120],
            GREEDY,
            "prompt 0 has 120 tokens, which with max_tokens=9 is more than "
            "model.max_seq_len=128; use max_tokens=8",
        ),
        ([[1] * 128], GREEDY, "shorten the prompt"),
    ],
)
def test_prompts_that_cannot_work_are_named(generator, prompts, sampling, line):
    with pytest.raises(UserError) as error:
        generator(prompts, sampling)
    assert line in str(error.value)


def test_text_goes_in_and_comes_out():
    tokenizer = Tokenizer.from_bytes()
    texts, sampling = ["def f", "", "é"], dataclasses.replace(DRAWN, max_tokens=12)
    with jax.set_mesh(mesh_of(ONE)):
        model = make(dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size))
        ids = [tokenizer.encode_prompt(text) for text in texts]
        rows = generate(model, ids, sampling, [tokenizer.eos_id])
        answers = generate_text(model, tokenizer, texts, sampling)
        assert answers == [tokenizer.decode(row) for row in rows]
        with pytest.raises(UserError, match=r"model\.vocab_size=96"):
            generate_text(make(), tokenizer, texts, sampling)
