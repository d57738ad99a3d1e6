"""Llama 3.1 8B (arXiv:2407.21783, table 3), trained from scratch with every device under fsdp.

    jaxgen train configs/llama3_8b.py --run-dir gs://BUCKET/llama3_8b

Hardware: 16 chips of TPU v5e (the default: one row of 4,096 tokens a chip), or 32 of v5p with
`:v5p`, which has the memory for four rows a chip.
"""

import dataclasses

from jaxgen import (
    DataConfig,
    DecoderConfig,
    LoopConfig,
    OptimizerConfig,
    RopeScaling,
    Source,
    TrainConfig,
)

config = TrainConfig(
    name="llama3_8b",
    model=DecoderConfig(
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
    ),
    data=DataConfig(
        sources=(Source(kind="jsonl", path="gs://BUCKET/text/*.jsonl"),),
        tokenizer="gs://BUCKET/llama3/tokenizer.json",
    ),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    train=LoopConfig(steps=100_000, batch_size=16, seq_len=4096, z_loss=1e-4),
)

v5p = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=128))
