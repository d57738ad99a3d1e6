"""The subcommands of `jaxgen bench`: a training run, collectives, a server under load.

Modules are imported where a command needs them, so that help and mistakes answer at once.
"""

import argparse
import json
import os
import signal
import sys
from typing import Any

from jaxgen.command import Command, join
from jaxgen.errors import UserError
from jaxgen.options import CONFIG, MODEL


def _bench_train(args: argparse.Namespace, config: Any) -> None:
    join()
    import jax

    from jaxgen.train.bench import bench_train, process_start_s, table

    results = bench_train(config, args.steps, started_s=process_start_s())
    if jax.process_index() == 0:
        print(json.dumps(results) if args.json else table(results))


def _bench_collectives(args: argparse.Namespace, config: Any) -> None:
    join()
    import jax

    from jaxgen.collectives import bench_collectives, table
    from jaxgen.sharding import make_mesh

    results = bench_collectives(
        make_mesh(config.mesh),
        min_bytes=args.min_bytes,
        max_bytes=args.max_bytes,
        dtype=args.dtype or "bfloat16",
        iterations=args.iterations,
    )
    if jax.process_index() == 0:
        print(json.dumps(results) if args.json else table(results))


def _bench_serve(args: argparse.Namespace, config: Any) -> int:
    from jaxgen.serve.bench import Limits, bench_own, bench_serve, shortcomings, table
    from jaxgen.serve.keys import read_keys
    from jaxgen.serve.load import Lengths, Load

    if (args.source is None) == (args.url is None):
        raise UserError("jaxgen bench serve needs one of MODEL, to serve it, and --url of a server")
    if args.rate is not None and args.concurrency is not None:
        raise UserError("--rate is of an open load and --concurrency of a closed one; give one")
    limits = Limits(args.max_ttft, args.max_tpot)
    for name, limit in zip(("--max-ttft", "--max-tpot"), limits, strict=True):
        if limit is not None and not limit > 0:
            raise UserError(f"{name} {limit}; use seconds, above 0")
    load = Load(
        num_requests=args.num_requests,
        rate=args.rate,
        concurrency=16 if args.concurrency is None else args.concurrency,
        warmup=args.warmup,
        input_tokens=Lengths.parse(args.input_tokens, "--input-tokens"),
        output_tokens=Lengths.parse(args.output_tokens, "--output-tokens"),
        shared_prefix=args.shared_prefix,
        vocab_size=args.vocab_size or (config.model.vocab_size if config else 256),
        seed=args.seed,
    )
    keys = read_keys(args.api_key_file or (), os.environ)
    given = {"model": args.name, "key": keys[0] if keys else None, "limits": limits}
    if args.url is not None:
        results = bench_serve(args.url, load, **given)
    else:
        set_here = [f"--{name}={value}" for name, value in args.overrides.items()]
        named = {"--name": args.name, "--devices": args.devices}
        set_here += [f"{name}={value}" for name, value in named.items() if value is not None]
        set_here += [f"--api-key-file={file}" for file in args.api_key_file or ()]
        # Whoever ends this process means its server too.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        results = bench_own(args.source, set_here, load, **given)
    print(json.dumps(results) if args.json else table(results))
    for line in shortcomings(results):
        print("jaxgen:", line, file=sys.stderr)
    # For a script that reads rates and no counts.
    return int(bool(results["errors"]))


def _collectives_config() -> Any:
    from jaxgen.collectives import CollectivesConfig

    return CollectivesConfig()


BENCHMARKS = {
    "bench train": Command(
        "Times the start and the training step.", _bench_train, CONFIG, ("--steps", "--json")
    ),
    "bench collectives": Command(
        "Times collectives over every mesh axis.",
        _bench_collectives,
        CONFIG,
        ("--min-bytes", "--max-bytes", "--dtype", "--iterations", "--json"),
        _collectives_config,
    ),
    "bench serve": Command(
        "Times a server under load, of its own or any that speaks as OpenAI's.",
        _bench_serve,
        MODEL,
        (
            *("--url", "--name", "--api-key-file", "--concurrency", "--rate", "--num-requests"),
            *("--warmup", "--input-tokens", "--output-tokens", "--shared-prefix", "--vocab-size"),
            *("--max-ttft", "--max-tpot", "--seed", "--json"),
        ),
        lambda: None,
        serves=True,
    ),
}
