"""The shape of a decoder, and how it is run: what its modules read.

D embed, N heads, K kv heads, H head dim, F mlp.
"""

import dataclasses
from typing import Literal

from jax.sharding import AbstractMesh, Mesh

from jaxgen.errors import MeshError, UserError
from jaxgen.nn.attention import Backend, ContextMethod
from jaxgen.nn.layers import ACTIVATIONS
from jaxgen.nn.moe import Dispatch
from jaxgen.nn.rope import RopeScaling
from jaxgen.nn.router import MoEConfig
from jaxgen.nn.schedule import Pipeline
from jaxgen.nn.stack import Remat
from jaxgen.ranges import AboveOne, Count, Positive, check_ranges
from jaxgen.sharding import AXES, Axes, Rules, logical_to_mesh


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder: what a checkpoint means."""

    vocab_size: Count
    """Tokens in the embedding table."""
    num_layers: Count
    """Layers."""
    embed_dim: Count
    """Width of the residual stream."""
    num_heads: Count
    """Query heads."""
    num_kv_heads: Count
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: Count
    """Width of one head; even, for RoPE."""
    mlp_dim: Count
    """Width of the gated MLP, or of each expert."""
    max_seq_len: Count
    """Tokens in the longest sequence the model is meant for."""
    rope_theta: AboveOne = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How positions past the trained length are read; None leaves them as they are."""
    rope_local_theta: AboveOne | None = None
    """Base in local layers, which are never scaled; None for the same as everywhere."""
    norm_eps: Positive = 1e-5
    """Added to the mean square in every RMSNorm."""
    norm_plus_one: bool = False
    """Whether norm scales are stored less one (Gemma)."""
    norms: Literal["pre", "post", "pre_post"] = "pre"
    """Norms before each block, after it, or both (Gemma 2 and 3)."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Of the gate."""
    tie_embeddings: bool = False
    """Whether the output layer is the embedding table."""
    embed_scale: Positive | None = None
    """Factor on embeddings (Gemma: sqrt(embed_dim)); None for 1."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen 2)."""
    qk_norm: bool | Literal["all"] = False
    """RMSNorm of every query and key head before RoPE (Qwen 3, Gemma 3); or of all heads together
    (OLMo 2)."""
    attention_scale: Positive | None = None
    """Factor on attention scores; None for head_dim ** -0.5."""
    attention_soft_cap: Positive | None = None
    """Scores s become cap * tanh(s / cap) (Gemma 2)."""
    logit_soft_cap: Positive | None = None
    """The same for the output logits."""
    sliding_window: Count | None = None
    """Tokens that a local layer sees, itself included."""
    layer_pattern: tuple[Literal["global", "local"], ...] = ("global",)
    """Kinds of the layers, repeated to num_layers."""
    moe: MoEConfig | None = None
    """Experts in place of the MLP; None for a dense model."""

    def __post_init__(self):
        check_ranges(self, "model.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}; every kv head serves equally many heads"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd; RoPE turns pairs")
        if not self.layer_pattern:
            raise UserError("model.layer_pattern is empty; name the kind of at least one layer")
        if "local" in self.layer_pattern and self.sliding_window is None:
            raise UserError(
                "model.layer_pattern has local layers and model.sliding_window is None; "
                "set the window in tokens"
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(f"model.activation={self.activation!r}; use {', '.join(ACTIVATIONS)}")

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it sees only the sliding window."""
        pattern = self.layer_pattern
        return tuple(pattern[i % len(pattern)] == "local" for i in range(self.num_layers))

    @property
    def num_params(self) -> int:
        """Parameters, embeddings included."""
        return self._count(self.moe.num_experts if self.moe else 1)

    @property
    def num_active_params(self) -> int:
        """Parameters that a token meets: those of its own experts, and all others."""
        return self._count(self.moe.num_experts_per_tok if self.moe else 1)

    def _mlp_matmul(self, experts: int) -> int:
        """Parameters in the products of one layer's MLP, or of so many experts and the router."""
        routed = 3 * self.embed_dim * self.mlp_dim * experts
        if self.moe is None:
            return routed
        return routed + self.embed_dim * (self.moe.num_experts + 3 * self.moe.shared_mlp_dim)

    def _count(self, experts: int) -> int:
        """Parameters with so many experts in each layer."""
        D, N, K, H = self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim
        layer = D * (N + 2 * K) * H + N * H * D + self._mlp_matmul(experts)
        layer += self.moe.num_experts if self.moe and self.moe.router == "sigmoid" else 0
        layer += (N + 2 * K) * H if self.qkv_bias else 0
        layer += ((N + K) * H if self.qk_norm == "all" else 2 * H) if self.qk_norm else 0
        layer += D * (4 if self.norms == "pre_post" else 2)
        tables = 1 if self.tie_embeddings else 2
        return tables * self.vocab_size * D + self.num_layers * layer + D

    @property
    def num_matmul_params(self) -> int:
        """Parameters in a matrix product that a token meets; the embedding lookup is none."""
        D, N, K, H = self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim
        mlp = self._mlp_matmul(self.moe.num_experts_per_tok if self.moe else 1)
        return self.num_layers * (D * (2 * N + 2 * K) * H + mlp) + self.vocab_size * D

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of one training step per token, at sequences of `seq_len` tokens.

        6 for each of `num_matmul_params`, and 12 * N * H for each key a query sees: on average half
        of a causal sequence, less in local layers. Rematerialised products do not count.
        """
        seen = 0.0
        for local in self.local_layers:
            window = min(self.sliding_window or seq_len, seq_len) if local else seq_len
            # Positions before the window is full see half of it on average.
            seen += (window * window / 2 + (seq_len - window) * window) / seq_len
        return 6 * self.num_matmul_params + 12 * self.num_heads * self.head_dim * seen

    def check_mesh(self, mesh: Mesh | AbstractMesh, rules: Rules) -> None:
        """Checks that every dimension divides into its shards on this mesh.

        Raises:
            UserError: the first that does not, or the mesh splits experts that are not there.
        """
        if self.moe is None and mesh.shape["expert"] > 1:
            rest = mesh.shape["fsdp"] * mesh.shape["expert"]
            raise MeshError(
                f"mesh.expert={mesh.shape['expert']} splits experts and model.moe is None",
                f"mesh.expert=1 mesh.fsdp={rest}",
            )
        sizes = {
            "vocab": ("model.vocab_size", self.vocab_size),
            "embed": ("model.embed_dim", self.embed_dim),
            "heads": ("model.num_heads", self.num_heads),
            "kv_heads": ("model.num_kv_heads", self.num_kv_heads),
            "mlp": ("model.mlp_dim", self.mlp_dim),
            "layers": ("model.num_layers", self.num_layers),
        }
        rules.check(mesh, sizes)
        if self.moe is not None:
            experts = ("model.moe.num_experts", self.moe.num_experts)
            width = ("model.moe.shared_mlp_dim", self.moe.shared_mlp_dim)
            embed = ("model.embed_dim", self.embed_dim)
            rules.check(mesh, {"expert": experts, "mlp": width, "expert_embed": embed})


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a decoder is run: nothing here changes what a checkpoint means."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of matrix products and activations; parameters are stored in float32."""
    attention: Backend = "auto"
    """Attention backend; auto takes the fastest that honours the mask on this platform."""
    context_attention: ContextMethod = "ring"
    """How a sequence split over `context` attends: ring passes keys and values on from device to
    device while each computes, all_gather collects them first."""
    remat: Remat = dataclasses.field(default_factory=Remat)
    """What is kept for the backward pass, and where."""
    pipeline: Pipeline = Pipeline()
    """How a batch goes through the stages of `mesh.pipeline`."""
    gather_once: Axes = None
    """Mesh axes over which the layers' weights are gathered, and their gradients reduced, once in a
    step (ZeRO-1), not in every layer, forward and backward (FSDP): less traffic, for the memory of
    all layers in the compute dtype."""
    expert_dispatch: Dispatch = "all_gather"
    """How tokens travel over mesh.expert: all to every device, whatever num_experts_per_tok is; or
    all_to_all, to the devices of their experts alone, which pays with a capacity."""
    expert_capacity: Positive | None = None
    """all_to_all: tokens that a device has room for, over an even share; tokens beyond it lose that
    expert and are counted. None for the worst case, which drops nothing."""

    def __post_init__(self):
        check_ranges(self, "compute.")
        for axis in logical_to_mesh(self.gather_once):
            if axis not in AXES:
                raise UserError(
                    f"compute.gather_once={self.gather_once!r}: no mesh axis {axis!r}; "
                    f"use {', '.join(AXES)}"
                )
        if self.expert_capacity is not None and self.expert_dispatch != "all_to_all":
            raise UserError(
                f"compute.expert_capacity={self.expert_capacity} with compute.expert_dispatch="
                f"{self.expert_dispatch!r}, which drops nothing; use 'all_to_all', or None"
            )
