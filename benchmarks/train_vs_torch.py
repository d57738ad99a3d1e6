"""Times a training step of jaxgen beside `transformers` + torch on the same shape and machine.

    pip install -e '.[parity]' && python benchmarks/train_vs_torch.py

One CPU device: a Llama of 8.4 M parameters (embed 256, 4 layers, 4 x 64 heads, mlp 1024, vocab
8192), 8 x 256 tokens, fp32. With `--device gpu` one of GPT-2's size (`configs/gpt_125m.py`), 16 x
2048 tokens, bf16 with fp32 weights. AdamW, gradients clipped at 1. Every side runs in a process of
its own; they take turns, a block of steps each, while the others sleep, so that a noisy machine is
noisy for all. Prints medians over all steps, ratios to the faster of torch's two ways, and the
seconds from each process's start to its first step done (jaxgen: with an empty compilation cache,
and again with the cache that this left).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

# Vocabulary, layers, width, heads, width of a head, of the MLP, rows and tokens of each, and dtype.
SHAPES = {
    "cpu": (8192, 4, 256, 4, 64, 1024, 8, 256, "float32"),
    "gpu": (50_304, 12, 768, 12, 64, 2048, 16, 2048, "bfloat16"),
}
DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
PLATFORM = {"cpu": "cpu", "gpu": "cuda"}[DEVICE]
VOCAB, LAYERS, WIDTH, HEADS, HEAD, MLP, BATCH, SEQ_LEN, DTYPE = SHAPES[DEVICE]


def jaxgen_step():
    """Returns a function that runs one step on random tokens and waits for it."""
    import dataclasses

    import jax
    import numpy as np

    import jaxgen

    jax.config.update("jax_platforms", PLATFORM)
    jaxgen.enable_compilation_cache(os.environ["BENCH_CACHE"])
    config = jaxgen.TrainConfig(
        name="bench",
        model=jaxgen.DecoderConfig(
            vocab_size=VOCAB,
            num_layers=LAYERS,
            embed_dim=WIDTH,
            num_heads=HEADS,
            num_kv_heads=HEADS,
            head_dim=HEAD,
            mlp_dim=MLP,
            max_seq_len=SEQ_LEN,
        ),
        data=jaxgen.DataConfig(),
        mesh=jaxgen.MeshConfig(),
        compute=jaxgen.ComputeConfig(dtype=DTYPE, remat=jaxgen.Remat.nothing()),
        train=jaxgen.LoopConfig(steps=1000, batch_size=BATCH, seq_len=SEQ_LEN),
    )
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, spike_factor=0.0)
    )
    mesh = jaxgen.make_mesh(config.mesh)
    with ThreadPoolExecutor(1) as pool:  # As in training: both compile at once.
        compiled = pool.submit(jaxgen.compile_step, config, mesh)
        state = jaxgen.make_state(config, mesh)
        step = compiled.result()
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ_LEN + 1))
    tokens = tokens.astype(np.int32)
    positions = np.tile(np.arange(SEQ_LEN, dtype=np.int32), (BATCH, 1))
    ones = np.ones((BATCH, SEQ_LEN), np.int32)
    arrays = (tokens[:, :-1], tokens[:, 1:], positions, ones, ones.astype(np.float32))
    batch = jaxgen.Batch(*(jax.device_put(a, jaxgen.batch_sharding(config, mesh)) for a in arrays))

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def torch_step(compiled: bool):
    """The same with `transformers`, eager or through `torch.compile`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=SEQ_LEN,
    )
    model = LlamaForCausalLM(config).to(PLATFORM).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=DEVICE == "gpu"
    )
    forward = torch.compile(model) if compiled else model
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN), device=PLATFORM)
    mixed = torch.autocast(PLATFORM, torch.bfloat16, enabled=DTYPE == "bfloat16")

    def run() -> float:
        optimizer.zero_grad()
        with mixed:
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return run


SIDES = {
    "jaxgen": jaxgen_step,
    "torch eager": lambda: torch_step(False),
    "torch compile": lambda: torch_step(True),
}


def serve(side: str) -> None:
    """Runs as many steps as each line of stdin says, and prints their seconds."""
    run = SIDES[side]()
    run()
    print("first step", flush=True)
    run()
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def start(side: str, device: str, cache: str) -> tuple[subprocess.Popen, float]:
    """Returns a process that has done its first step, and the seconds that took."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, "--side", side],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "BENCH_CACHE": cache,
            "BENCH_DEVICE": device,
            # All sides are on one GPU at once.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # Huge pages for every side: the jaxgen command switches them on by itself.
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        },
    )
    if process.stdout.readline().strip() != "first step":
        sys.exit(f"{side} did not start")
    return process, time.perf_counter() - began


def stop(process: subprocess.Popen) -> None:
    """Lets a process end."""
    process.stdin.close()
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(args.side)
    processes, first = {}, {}
    with tempfile.TemporaryDirectory() as cache:
        cold, first["jaxgen, cold"] = start("jaxgen", args.device, cache)
        stop(cold)
        for side in SIDES:
            processes[side], first[side] = start(side, args.device, cache)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side, process in processes.items():
                process.stdin.write(f"{args.steps}\n")
                process.stdin.flush()
                # The first step of a turn wakes caches and threads up.
                seconds[side] += json.loads(process.stdout.readline())[1:]
        for process in processes.values():
            stop(process)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    best = min(medians["torch eager"], medians["torch compile"])
    if args.json:
        ratio = medians["jaxgen"] / best
        print(json.dumps({"step_s": medians, "ratio": ratio, "first_step_s": first}))
        return
    tokens = math.prod(SHAPES[args.device][6:8])
    print(f"{'':14} {'step s':>8} {'tokens/s':>9} {'ratio':>6} {'first step s':>13}")
    print(f"{'jaxgen, cold':14} {'':8} {'':9} {'':6} {first['jaxgen, cold']:13.1f}")
    for side, median in medians.items():
        rate, ratio = tokens / median, median / best
        print(f"{side:14} {median:8.3f} {rate:9.0f} {ratio:6.2f} {first[side]:13.1f}")


if __name__ == "__main__":
    main()
