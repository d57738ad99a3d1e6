"""The demo: a 5M parameter model of Python code, on eight simulated devices.

    jaxgen train configs/tiny.py --devices 8
    jaxgen generate runs/tiny --devices 8 --prompt "def main("

Hardware: two CPU cores. The text is the standard library of the Python that runs it.
"""

from jaxgen import (
    ComputeConfig,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    LoopConfig,
    MeshConfig,
    OptimizerConfig,
    Remat,
    TrainConfig,
)

config = TrainConfig(
    name="tiny",
    model=DecoderConfig(
        vocab_size=8192,
        num_layers=4,
        embed_dim=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=768,
        max_seq_len=256,
        tie_embeddings=True,
    ),
    data=DataConfig(tokenizer="bpe", bpe_vocab_size=8192),
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    # fp32: a CPU has no fast bf16. At this size nothing needs to be computed twice to fit.
    compute=ComputeConfig(dtype="float32", remat=Remat.nothing()),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20),
    train=LoopConfig(steps=200, batch_size=16, seq_len=256),
    eval=EvalConfig(every_steps=50, batches=4),
)
