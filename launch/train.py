r"""Trains a model on every device of every host: copy this file, edit it, run it.

One TPU VM, after `pip install 'jaxgen[tpu]'` there:
    python3 train.py runs/mine
All hosts of a slice, each with this file; the run directory is one that all of them see:
    gcloud compute tpus tpu-vm scp train.py NAME: --zone=ZONE --worker=all
    gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
        --command="python3 train.py gs://BUCKET/mine"
A laptop, on eight simulated devices (small, or it takes a day):
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python launch/train.py runs/mine \
        model.num_layers=2 model.embed_dim=64 train.seq_len=128 train.steps=20

Every argument after the run directory sets a field. The same command again resumes the run.
"""

import argparse
import os

import jaxgen
from jaxgen import distributed
from jaxgen.train.loop import train

config = jaxgen.TrainConfig(
    name="mine",
    model=jaxgen.DecoderConfig(
        vocab_size=32_000,
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        mlp_dim=2048,
        max_seq_len=1024,
    ),
    # Your text: sources=(jaxgen.Source(kind="jsonl", path="gs://BUCKET/text/*.jsonl"),)
    data=jaxgen.DataConfig(tokenizer="bpe", bpe_vocab_size=32_000),
    mesh=jaxgen.MeshConfig(data=1, fsdp=-1, tensor=1),
    optimizer=jaxgen.OptimizerConfig(learning_rate=6e-4, warmup_steps=200),
    train=jaxgen.LoopConfig(steps=2000, batch_size=64, seq_len=1024),
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="?", default="runs/mine")
    parser.add_argument("fields", nargs="*", metavar="field=value")
    args = parser.parse_args()
    try:
        if wrong := [field for field in args.fields if "=" not in field]:
            raise jaxgen.UserError(f"{wrong[0]} sets nothing; use field=value")
        config = jaxgen.override(config, dict(field.split("=", 1) for field in args.fields))
        distributed.initialize(os.environ)
        jaxgen.enable_compilation_cache()
        train(config, args.run_dir)
    except jaxgen.UserError as error:
        parser.exit(2, f"{error}\n")
