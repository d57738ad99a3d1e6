"""The held-out loss against the plain forward pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import GEMMA, config_of, program, rows

from jaxgen.sharding import MeshConfig
from jaxgen.train.evaluate import evaluate
from jaxgen.train.program import lower_evaluation


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=1), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_the_mean_is_over_tokens_of_all_batches(mesh):
    """Batches with fewer tokens weigh less."""
    run = program(config_of(GEMMA, mesh=mesh))
    model = run.new_state().model
    batches = [rows(step) for step in range(3)]
    batches[1].weights[2:] = 0
    evaluation = lower_evaluation(run.config, run.mesh).compile()
    placed = [run.place(batch) for batch in batches]
    result = evaluate(evaluation, model, placed, bytes_per_token=2.5)

    @jax.jit
    def losses(model, batch):
        logits = model(batch.tokens, batch.positions, batch.segments)
        hot = jax.nn.one_hot(batch.targets, logits.shape[-1])
        spec = run.config.rules.on(run.mesh)("batch", "seq")
        nll = -jnp.einsum("BTV,BTV->BT", jax.nn.log_softmax(logits), hot, out_sharding=spec)
        return nll

    with jax.set_mesh(run.mesh):
        nll = np.concatenate([np.asarray(losses(model, batch)) for batch in placed])
    counted = np.concatenate([batch.weights for batch in batches]) > 0
    mean = nll[counted].astype(np.float64).mean()
    np.testing.assert_allclose(result["eval_loss"], mean, rtol=1e-6)
    # 2.5 bytes a token: a token of `mean` nats has mean / ln 2 bits.
    bits = mean / math.log(2) / 2.5
    np.testing.assert_allclose(result["eval_bits_per_byte"], bits, rtol=1e-6)
    by_batch = np.mean(
        [nll[i * 8 : i * 8 + 8][counted[i * 8 : i * 8 + 8]].mean() for i in (0, 1, 2)]
    )
    assert abs(by_batch - mean) > 1e-4 * mean, "a mean over batches would not be seen"
