"""One optimizer step as one jitted, donated program."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxgen.models.decoder import Decoder
from jaxgen.nn.lora import Adapters, attach, freeze
from jaxgen.nn.pipeline import cut
from jaxgen.nn.router import RouterSums
from jaxgen.train.optimizer import global_norm, learning_rate, make_optimizer

if TYPE_CHECKING:
    from jaxgen.config import TrainConfig

# The running mean of gradient norms forgets half of itself in about 35 steps.
NORM_DECAY = 0.98


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a run carries from step to step.

    A pytree whose leaves are arrays, or their shapes or shardings: so no field says jax.Array.
    """

    model: Any
    """What is trained, in fp32: a Decoder, or the Adapters of a frozen one."""
    opt_state: Any
    """optax's moments, sharded like their parameters."""
    step: Any
    """Steps done, int32 []; the data position too, for a batch is a function of the step."""
    grad_norm_mean: Any
    """Running mean of the gradient norms of steps that were applied, float32 []."""
    skipped: Any
    """Steps skipped so far, int32 []."""
    skipped_in_row: Any
    """Steps skipped since the last one that was applied, int32 []."""
    base: Any = None
    """The frozen Decoder beside adapters, in the compute dtype; None if all of it is trained."""

    @property
    def decoder(self) -> Decoder:
        """The model as it stands, adapters included."""
        return self.model if self.base is None else attach(self.base, self.model)

    def saved(self) -> "TrainState":
        """All that a checkpoint has to hold: the base is read from where it came from."""
        return dataclasses.replace(self, base=None)


def init_state(config: "TrainConfig", key: jax.Array) -> TrainState:
    """Returns a state of random weights. Call it under `jax.jit` inside `jax.set_mesh(mesh)`."""
    decoder = Decoder(config.model, key=key, compute=config.compute, rules=config.rules)
    return first_state(config, key, decoder)


def first_state(config: "TrainConfig", key: jax.Array, decoder: Decoder) -> TrainState:
    """Returns the state before the first step of a run that begins with these weights."""
    compute, base = config.compute, None
    model: Any = decoder
    if config.lora is not None:
        base = freeze(decoder, jnp.dtype(compute.dtype))
        model = Adapters(config.lora, config.model, key=key, compute=compute, rules=config.rules)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        model=model,
        opt_state=make_optimizer(config.optimizer).init(model),
        step=zero,
        grad_norm_mean=jnp.zeros((), jnp.float32),
        skipped=zero,
        skipped_in_row=zero,
        base=base,
    )


def train_step(
    config: "TrainConfig", state: TrainState, batch: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the next state and this step's metrics.

    A step whose loss or gradient is not finite, or whose gradient norm is a spike, changes nothing
    but the counters. Metrics are scalars: loss (mean nats a token, without z-loss), grad_norm
    (before clipping), learning_rate, tokens (that counted), skipped (so far), skipped_in_row; with
    experts also `RouterSums.metrics`, whose losses each micro-batch forms of its own loads.
    """
    accum, moe = config.train.grad_accum_steps, config.model.moe
    total_weight = jnp.sum(batch.weights)

    def loss_fn(model: Any, batch: Any):
        decoder = dataclasses.replace(state, model=model).decoder
        objective, nll, routed = decoder.loss_sums(*batch, z_loss=config.train.z_loss)
        return objective / total_weight, (nll / total_weight, routed)

    gradient: Any = jax.grad(loss_fn, has_aux=True)
    if accum == 1:
        grads, (loss, routed) = gradient(state.model, batch)
    else:

        def accumulate(carry, micro_batch):
            return jax.tree.map(jnp.add, carry, gradient(state.model, micro_batch)), None

        none = RouterSums.zeros(config.model.num_layers, moe.num_experts) if moe else None
        zeros = (jax.tree.map(jnp.zeros_like, state.model), (jnp.zeros((), jnp.float32), none))
        sums, _ = jax.lax.scan(accumulate, zeros, cut(batch, accum))
        grads, (loss, routed) = sums

    grad_norm = global_norm(grads)
    optimizer = config.optimizer
    if optimizer.clip_grad_norm:
        scale = jnp.minimum(1.0, optimizer.clip_grad_norm / (grad_norm + 1e-6))
        grads = jax.tree.map(lambda grad: grad * scale, grads)
    rate = learning_rate(optimizer, config.train.steps, state.step)
    direction, opt_state = _directions(optimizer, grads, state)
    model = jax.tree.map(lambda param, way: param + rate * way, state.model, direction)
    if moe and moe.bias_update_rate and routed is not None and state.base is None:
        model = model.balanced(routed.counts)

    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    mean = state.grad_norm_mean
    if optimizer.spike_factor:
        settled = state.step >= optimizer.warmup_steps
        good &= ~(settled & (mean > 0) & (grad_norm > optimizer.spike_factor * mean))
    new_mean = jnp.where(mean > 0, NORM_DECAY * mean + (1 - NORM_DECAY) * grad_norm, grad_norm)
    applied = (model, opt_state, new_mean)
    kept = (state.model, state.opt_state, mean)
    model, opt_state, mean = jax.tree.map(lambda a, b: jnp.where(good, a, b), applied, kept)
    state = TrainState(
        model=model,
        opt_state=opt_state,
        step=state.step + 1,
        grad_norm_mean=mean,
        skipped=state.skipped + jnp.where(good, 0, 1),
        skipped_in_row=jnp.where(good, 0, state.skipped_in_row + 1),
        base=state.base,
    )
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "tokens": total_weight,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
    if routed is not None:
        metrics |= routed.metrics(total_weight)
    return state, metrics


def _directions(optimizer, grads, state: TrainState):
    """The optimizer's update, with shardings left to the compiler.

    Muon multiplies matrices that are split over the dimension it contracts; every result comes
    back in the sharding of what it replaces.
    """

    def update(grads, opt_state, model):
        # optax mixes integer counts with floats.
        with jax.numpy_dtype_promotion("standard"):
            return make_optimizer(optimizer).update(grads, opt_state, model)

    specs = jax.tree.map(lambda x: jax.typeof(x).sharding, (state.model, state.opt_state))
    update: Any = jax.sharding.auto_axes(update, out_sharding=specs)
    return update(grads, state.opt_state, state.model)
