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

LLAMA_3_2_1B = dataclasses.replace(
    LLAMA_3_1_8B,
    num_layers=16,
    embed_dim=2048,
    head_dim=64,
    mlp_dim=8192,
    tie_embeddings=True,
    rope_scaling=RopeScaling(kind="llama3", factor=32.0, original_max_seq_len=8192),
)
LLAMA_3_2_3B = dataclasses.replace(
    LLAMA_3_2_1B, num_layers=28, embed_dim=3072, num_heads=24, head_dim=128
)

SMOLLM2_135M = DecoderConfig(
    vocab_size=49_152,
    num_layers=30,
    embed_dim=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    max_seq_len=8192,
    rope_theta=100_000.0,
    tie_embeddings=True,
)
SMOLLM2_360M = dataclasses.replace(
    SMOLLM2_135M, num_layers=32, embed_dim=960, num_heads=15, num_kv_heads=5, mlp_dim=2560
)
SMOLLM2_1_7B = dataclasses.replace(
    SMOLLM2_135M,
    num_layers=24,
    embed_dim=2048,
    num_heads=32,
    num_kv_heads=32,
    mlp_dim=8192,
    rope_theta=130_000.0,
)

MISTRAL_7B_V0_3 = DecoderConfig(
    vocab_size=32_768,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    max_seq_len=32_768,
    rope_theta=1_000_000.0,
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

QWEN2_5_0_5B = DecoderConfig(
    vocab_size=151_936,
    num_layers=24,
    embed_dim=896,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=4864,
    max_seq_len=32_768,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=True,
)
QWEN2_5_7B = dataclasses.replace(
    QWEN2_5_0_5B,
    vocab_size=152_064,
    num_layers=28,
    embed_dim=3584,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=18_944,
    max_seq_len=131_072,
    tie_embeddings=False,
)

QWEN3_0_6B = DecoderConfig(
    vocab_size=151_936,
    num_layers=28,
    embed_dim=1024,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=3072,
    max_seq_len=40_960,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    tie_embeddings=True,
    qk_norm=True,
)
QWEN3_1_7B = dataclasses.replace(QWEN3_0_6B, embed_dim=2048, mlp_dim=6144)
QWEN3_4B = dataclasses.replace(
    QWEN3_0_6B, num_layers=36, embed_dim=2560, num_heads=32, mlp_dim=9728
)
QWEN3_8B = dataclasses.replace(QWEN3_4B, embed_dim=4096, mlp_dim=12_288, tie_embeddings=False)
QWEN3_14B = dataclasses.replace(
    QWEN3_8B, num_layers=40, embed_dim=5120, num_heads=40, mlp_dim=17_408
)
QWEN3_32B = dataclasses.replace(QWEN3_14B, num_layers=64, num_heads=64, mlp_dim=25_600)
QWEN3_30B_A3B = dataclasses.replace(
    QWEN3_8B,
    num_layers=48,
    embed_dim=2048,
    num_kv_heads=4,
    mlp_dim=768,
    moe=MoEConfig(num_experts=128, num_experts_per_tok=8, load_balance_weight=0.008),
)
QWEN3_235B_A22B = dataclasses.replace(
    QWEN3_30B_A3B, num_layers=94, embed_dim=4096, num_heads=64, mlp_dim=1536
)

GEMMA_3_270M = DecoderConfig(
    vocab_size=262_144,
    num_layers=18,
    embed_dim=640,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    mlp_dim=2048,
    max_seq_len=32_768,
    rope_theta=1_000_000.0,
    rope_local_theta=10_000.0,
    norm_eps=1e-6,
    norm_plus_one=True,
    norms="pre_post",
    activation="gelu_tanh",
    tie_embeddings=True,
    embed_scale=640**0.5,
    qk_norm=True,
    sliding_window=512,
    layer_pattern=("local",) * 5 + ("global",),
)
GEMMA_3_1B = dataclasses.replace(
    GEMMA_3_270M, num_layers=26, embed_dim=1152, mlp_dim=6912, embed_scale=1152**0.5
)
GEMMA_3_4B = dataclasses.replace(
    GEMMA_3_270M,
    vocab_size=262_208,
    num_layers=34,
    embed_dim=2560,
    num_heads=8,
    num_kv_heads=4,
    mlp_dim=10_240,
    max_seq_len=131_072,
    rope_scaling=RopeScaling(kind="linear", factor=8.0),
    embed_scale=2560**0.5,
    sliding_window=1024,
)
GEMMA_3_12B = dataclasses.replace(
    GEMMA_3_4B,
    num_layers=48,
    embed_dim=3840,
    num_heads=16,
    num_kv_heads=8,
    mlp_dim=15_360,
    embed_scale=3840**0.5,
)
GEMMA_3_27B = dataclasses.replace(
    GEMMA_3_4B,
    num_layers=62,
    embed_dim=5376,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    mlp_dim=21_504,
    embed_scale=5376**0.5,
    attention_scale=168**-0.5,
)

OLMO_2_7B = DecoderConfig(
    vocab_size=100_352,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    mlp_dim=11_008,
    max_seq_len=4096,
    rope_theta=500_000.0,
    norm_eps=1e-6,
    norms="post",
    qk_norm="all",
)

PHI_3_MINI_4K = DecoderConfig(
    vocab_size=32_064,
    num_layers=32,
    embed_dim=3072,
    num_heads=32,
    num_kv_heads=32,
    head_dim=96,
    mlp_dim=8192,
    max_seq_len=4096,
    sliding_window=2047,
    layer_pattern=("local",),
)
