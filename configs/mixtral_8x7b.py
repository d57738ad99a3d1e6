"""Mixtral 8x7B (arXiv:2401.04088), trained from scratch: 8 experts a layer, one to a device.

    jaxgen train configs/mixtral_8x7b.py --run-dir gs://BUCKET/mixtral_8x7b

Hardware: 128 chips of TPU v5p (16 fsdp x 8 expert), two rows of 4,096 tokens a chip.
"""

from jaxgen import DataConfig, LoopConfig, MeshConfig, OptimizerConfig, Source, TrainConfig
from jaxgen.models.presets import MIXTRAL_8X7B

config = TrainConfig(
    name="mixtral_8x7b",
    model=MIXTRAL_8X7B,
    data=DataConfig(
        sources=(Source(kind="jsonl", path="gs://BUCKET/text/*.jsonl"),),
        tokenizer="gs://BUCKET/mixtral/tokenizer.json",
    ),
    mesh=MeshConfig(fsdp=-1, expert=8),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    train=LoopConfig(steps=100_000, batch_size=256, seq_len=4096, z_loss=1e-4),
)
