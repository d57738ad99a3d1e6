"""Times jaxgen's engine beside `transformers` generate on the same model and machine.

    pip install -e '.[parity]' && python benchmarks/serve_vs_transformers.py FOLDER

FOLDER is a Hugging Face model folder, such as SmolLM2-135M's. Greedy, one device for both: a CPU
in fp32, with as many threads, or with `--device gpu` a GPU in bf16. Each side runs in a process of
its own; they take turns at every task, so that a noisy machine is noisy for both, and a ratio is of
one turn's two times. Prints medians.

- `one`: 64 tokens after a prompt of 32.
- `sixteen`: 16 requests at once, prompts of 8 to 128 tokens and answers of 32 to 96. transformers
  has them in one static batch; the tokens that it makes past a request's answer do not count.
- `first token`: of a prompt of 512 tokens, none of which have been seen.
- `first token again`: of a prompt whose first 496 tokens have been.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

TASKS = {"one": 64, "sixteen": 996, "first token": 1, "first token again": 1}
DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
PROMPTS, ANSWERS = [8 + 8 * i for i in range(16)], [96 - (i * 37) % 65 for i in range(16)]


def requests(task: str, turn: int, vocab_size: int) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens follow each."""
    rng = np.random.default_rng(turn)
    sizes = {"one": [(32, 64)], "sixteen": list(zip(PROMPTS, ANSWERS, strict=True))}
    return [
        (rng.integers(10, vocab_size, prompt).tolist(), answer)
        for prompt, answer in sizes.get(task, [(512, 1)])
    ]


def jaxgen_side(folder: str):
    """Returns a function that serves requests."""
    import jax

    import jaxgen

    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[DEVICE])
    jaxgen.enable_compilation_cache()
    found = jaxgen.open_model(folder)
    mesh = jaxgen.make_mesh(jaxgen.MeshConfig())
    model, _ = jaxgen.load_model(found, found.serve_config(), mesh)
    with jax.set_mesh(mesh):
        engine = jaxgen.Engine(model)

    def run(asked):
        samplings = [jaxgen.SamplingConfig(max_tokens=answer) for _, answer in asked]
        done = engine.generate([prompt for prompt, _ in asked], samplings)
        assert [len(each.tokens) for each in done] == [answer for _, answer in asked]

    return run, model.config.vocab_size


def transformers_side(folder: str):
    """Returns a function that generates for requests, as one batch."""
    import torch
    from transformers import AutoModelForCausalLM

    device, dtype = {"cpu": ("cpu", torch.float32), "gpu": ("cuda", torch.bfloat16)}[DEVICE]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None

    def run(asked):
        longest = max(len(prompt) for prompt, _ in asked)
        tokens = torch.zeros((len(asked), longest), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, (prompt, _) in enumerate(asked):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        count = max(answer for _, answer in asked)
        with torch.inference_mode():
            out = model.generate(
                tokens.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            ).cpu()
        assert out.shape[1] == longest + count

    return run, model.config.vocab_size


SIDES = {"jaxgen": jaxgen_side, "transformers": transformers_side}


def serve(side: str, folder: str) -> None:
    """Runs the task and turn of each line of stdin, and prints its seconds."""
    run, vocab_size = SIDES[side](folder)
    run(requests("one", 0, vocab_size))
    print("ready", flush=True)
    for line in sys.stdin:
        task, turn = json.loads(line)
        asked = requests(task, turn, vocab_size)
        if task == "first token again":
            run(asked)
            asked = [(prompt[:-16] + prompt[:16], answer) for prompt, answer in asked]
        start = time.perf_counter()
        run(asked)
        print(time.perf_counter() - start, flush=True)


def start(side: str, folder: str, device: str) -> subprocess.Popen:
    """Returns a process that is ready."""
    process = subprocess.Popen(
        [sys.executable, __file__, folder, "--side", side],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "BENCH_DEVICE": device,
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            # Both are on one GPU at once.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # Huge pages for both: the jaxgen command switches them on by itself.
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        },
    )
    if process.stdout.readline().strip() != "ready":
        sys.exit(f"{side} did not start")
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a Hugging Face model folder")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--turns", type=int, default=7, help="of each side at each task")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(args.side, args.folder)
    processes = {side: start(side, args.folder, args.device) for side in SIDES}
    seconds = {task: {side: [] for side in SIDES} for task in TASKS}
    for turn in range(1, args.turns + 1):
        for task in TASKS:
            for side, process in processes.items():
                process.stdin.write(json.dumps([task, turn]) + "\n")
                process.stdin.flush()
                seconds[task][side].append(float(process.stdout.readline()))
            print(f"turn {turn}, {task}: {seconds[task]}", file=sys.stderr, flush=True)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    rows = {}
    for task, times in seconds.items():
        ratios = [t / j for j, t in zip(times["jaxgen"], times["transformers"], strict=True)]
        rows[task] = {side: statistics.median(each) for side, each in times.items()}
        rows[task]["ratio"] = statistics.median(ratios)
    firsts = zip(*(seconds[t]["jaxgen"] for t in ("first token again", "first token")), strict=True)
    found = statistics.median(again / cold for again, cold in firsts)
    if args.json:
        print(json.dumps({"seconds": rows, "prefix_found_ratio": found, "all": seconds}))
        return
    print(f"{'':18} {'jaxgen s':>9} {'tokens/s':>9} {'transformers s':>15} {'tokens/s':>9} ratio")
    for task, row in rows.items():
        rates = [TASKS[task] / row[side] for side in SIDES]
        print(
            f"{task:18} {row['jaxgen']:9.3f} {rates[0]:9.1f} {row['transformers']:15.3f} "
            f"{rates[1]:9.1f} {row['ratio']:5.2f}"
        )
    print(f"a first token whose prompt was seen takes {found:.2f} of one whose was not")


if __name__ == "__main__":
    main()
