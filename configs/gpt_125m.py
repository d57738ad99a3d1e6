"""A 125M parameter model, the size of GPT-2 small, on one accelerator.

    jaxgen train configs/gpt_125m.py --data.sources.0.path 'my_text/*.txt'

Hardware: one TPU chip or GPU with 16 GB or more; more of them share the batch (fsdp).
"""

from jaxgen import (
    DataConfig,
    DecoderConfig,
    LoopConfig,
    OptimizerConfig,
    Source,
    TrainConfig,
)

config = TrainConfig(
    name="gpt_125m",
    model=DecoderConfig(
        vocab_size=50_304,
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        mlp_dim=2048,
        max_seq_len=2048,
        tie_embeddings=True,
    ),
    data=DataConfig(
        sources=(Source(kind="text", path="data/*.txt"),),
        tokenizer="bpe",
        bpe_vocab_size=50_304,
    ),
    optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=700),
    # 2.5B tokens, 20 for each parameter; in 4 parts the activations fit in 16 GB.
    train=LoopConfig(steps=10_000, batch_size=128, seq_len=2048, grad_accum_steps=4, z_loss=1e-4),
)
