"""The shapes of published models, as data. Each is a starting point for `dataclasses.replace`.

Sources: the models' own config.json at huggingface.co; Llama 3.1: arXiv:2407.21783, table 3;
Mixtral: arXiv:2401.04088, table 1; Qwen 3: arXiv:2505.09388, table 2. Their load-balance
coefficients (0.02, 0.001, 0.001, 0.001) times num_experts_per_tok are ours, see `RouterSums.of`.
"""

import dataclasses

from jaxgen.models.config import DecoderConfig
from jaxgen.nn.rope import RopeScaling
from jaxgen.nn.router import MoEConfig

LLAMA_3_1_8B = DecoderConfig(
    vocab_size=128_256,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    max_seq_len=131_072,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=8192),
)
LLAMA_3_1_70B = dataclasses.replace(
    LLAMA_3_1_8B, num_layers=80, embed_dim=8192, num_heads=64, mlp_dim=28_672
)
LLAMA_3_1_405B = dataclasses.replace(
    LLAMA_3_1_8B, num_layers=126, embed_dim=16_384, num_heads=128, mlp_dim=53_248
)

MIXTRAL_8X7B = DecoderConfig(
    vocab_size=32_000,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    max_seq_len=32_768,
    rope_theta=1_000_000.0,
    moe=MoEConfig(num_experts=8, num_experts_per_tok=2, load_balance_weight=0.04),
)
MIXTRAL_8X22B = dataclasses.replace(
    MIXTRAL_8X7B,
    num_layers=56,
    embed_dim=6144,
    num_heads=48,
    mlp_dim=16_384,
    max_seq_len=65_536,
    moe=MoEConfig(num_experts=8, num_experts_per_tok=2, load_balance_weight=0.002),
)

QWEN3_30B_A3B = DecoderConfig(
    vocab_size=151_936,
    num_layers=48,
    embed_dim=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=768,
    max_seq_len=40_960,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    qk_norm=True,
    moe=MoEConfig(num_experts=128, num_experts_per_tok=8, load_balance_weight=0.008),
)
QWEN3_235B_A22B = dataclasses.replace(
    QWEN3_30B_A3B, num_layers=94, embed_dim=4096, num_heads=64, mlp_dim=1536
)
