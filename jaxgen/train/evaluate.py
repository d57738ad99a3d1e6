"""The loss on held-out rows."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.models.decoder import Decoder
from jaxgen.ranges import Count, CountOrZero, check_ranges


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When and on how much held-out text the loss is measured."""

    every_steps: CountOrZero = 100
    """Steps between evaluations, also before the first and after the last; 0 for never."""
    batches: Count = 8
    """Held-out batches in each, always the same; fewer if the held-out set is smaller."""

    def __post_init__(self):
        check_ranges(self, "eval.")


def evaluate_batch(model: Decoder, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Returns (the sum of negative log-likelihoods in nats, the number of tokens that count)."""
    _, nll, _ = model.loss_sums(*batch)
    return nll, jnp.sum(batch.weights)


def evaluate(
    evaluation: Callable[[Decoder, Any], tuple[jax.Array, jax.Array]],
    model: Decoder,
    batches: Iterable[Any],
    *,
    bytes_per_token: float,
) -> dict[str, float]:
    """Returns eval_loss (mean nats a token) and eval_bits_per_byte of text.

    Args:
        evaluation: `evaluate_batch`, compiled.
        model: the parameters to measure.
        batches: held-out batches.
        bytes_per_token: bytes of held-out text a token that counts; it makes the loss comparable
            between tokenizers.
    """
    # All batches are dispatched before the first result is read.
    sums = [evaluation(model, batch) for batch in batches]
    nll = math.fsum(float(nll) for nll, _ in sums)
    tokens = math.fsum(float(tokens) for _, tokens in sums)
    loss = nll / tokens
    return {"eval_loss": loss, "eval_bits_per_byte": loss / math.log(2) / bytes_per_token}
