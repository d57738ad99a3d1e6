"""Llama 3.1 8B (arXiv:2407.21783, table 3), trained from scratch with every device under fsdp.

    jaxgen train configs/llama3_8b.py --run-dir gs://BUCKET/llama3_8b

Hardware: 16 chips of TPU v5e (the default: one row of 4,096 tokens a chip), or 32 of v5p with
`:v5p`, which has the memory for four rows a chip.
"""

import dataclasses

from jaxgen import DataConfig, LoopConfig, OptimizerConfig, Source, TrainConfig
from jaxgen.models.presets import LLAMA_3_1_8B

config = TrainConfig(
    name="llama3_8b",
    model=LLAMA_3_1_8B,
    data=DataConfig(
        sources=(Source(kind="jsonl", path="gs://BUCKET/text/*.jsonl"),),
        tokenizer="gs://BUCKET/llama3/tokenizer.json",
    ),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    train=LoopConfig(steps=100_000, batch_size=16, seq_len=4096, z_loss=1e-4),
)

v5p = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=128))
