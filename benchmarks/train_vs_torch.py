"""Times a training step of jaxgen beside `transformers` + torch on the same shape and machine.

    pip install -e '.[parity]' && python benchmarks/train_vs_torch.py

A Llama of 8.4 M parameters (embed 256, 4 layers, 4 x 64 heads, mlp 1024, vocab 8192), 8 x 256
tokens, fp32, AdamW, gradients clipped at 1, one CPU device. Every side runs in a process of its
own; they take turns, a block of steps each, while the others sleep, so that a noisy machine is
noisy for all. Prints medians over all steps, ratios to the faster of torch's two ways, and the
seconds from each process's start to its first step done (jaxgen: with an empty compilation cache,
and again with the cache that this left).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

SHAPE = {
    "vocab_size": 8192,
    "num_layers": 4,
    "embed_dim": 256,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 64,
    "mlp_dim": 1024,
    "max_seq_len": 256,
}
BATCH, SEQ_LEN = 8, 256


def jaxgen_step():
    """Returns a function that runs one step on random tokens and waits for it."""
    import dataclasses

    import jax
    import numpy as np

    import jaxgen

    jax.config.update("jax_platforms", "cpu")
    jaxgen.enable_compilation_cache(os.environ["BENCH_CACHE"])
    config = jaxgen.TrainConfig(
        name="bench",
        model=jaxgen.DecoderConfig(**SHAPE),
        data=jaxgen.DataConfig(),
        mesh=jaxgen.MeshConfig(),
        compute=jaxgen.ComputeConfig(dtype="float32", remat=jaxgen.Remat.nothing()),
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
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (BATCH, SEQ_LEN + 1))
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
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SHAPE["vocab_size"],
            hidden_size=SHAPE["embed_dim"],
            intermediate_size=SHAPE["mlp_dim"],
            num_hidden_layers=SHAPE["num_layers"],
            num_attention_heads=SHAPE["num_heads"],
            num_key_value_heads=SHAPE["num_kv_heads"],
            max_position_embeddings=SHAPE["max_seq_len"],
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    forward = torch.compile(model) if compiled else model
    tokens = torch.randint(0, SHAPE["vocab_size"], (BATCH, SEQ_LEN))

    def run() -> float:
        optimizer.zero_grad()
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


def start(side: str, cache: str) -> tuple[subprocess.Popen, float]:
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
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(args.side)
    processes, first = {}, {}
    with tempfile.TemporaryDirectory() as cache:
        cold, first["jaxgen, cold"] = start("jaxgen", cache)
        stop(cold)
        for side in SIDES:
            processes[side], first[side] = start(side, cache)
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
    print(f"{'':14} {'step s':>8} {'tokens/s':>9} {'ratio':>6} {'first step s':>13}")
    print(f"{'jaxgen, cold':14} {'':8} {'':9} {'':6} {first['jaxgen, cold']:13.1f}")
    for side, median in medians.items():
        rate, ratio = BATCH * SEQ_LEN / median, median / best
        print(f"{side:14} {median:8.3f} {rate:9.0f} {ratio:6.2f} {first[side]:13.1f}")


if __name__ == "__main__":
    main()
