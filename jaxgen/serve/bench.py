"""How fast a server answers a load: throughput, latencies, and its share of the decode roofline.

- TTFT: from when a request was due to the first text of its answer.
- TPOT: from the first text to the last, over the tokens after the first; one number a request.
- ITL: between one arrival of text and the next, whose tokens may be several.
- goodput: answers a second that kept to all limits given.

In an open load requests are due by a Poisson process and are sent then, whatever has been answered;
all times count from when they were due, so a client that is late hides nothing. Rates are over the
time from the first request to the last answer, the ends included where a closed load runs dry.
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxgen.errors import UserError
from jaxgen.progress import progress
from jaxgen.serve.ceiling import measure_ceiling
from jaxgen.serve.client import Client, Streamed, drive_closed, drive_open
from jaxgen.serve.load import Ask, Load
from jaxgen.tables import columns

PERCENTILES = (50, 90, 99)
# A client that is this near to all that it can do may be what was measured.
BUSY = 0.5
# Far more than any cache holds.
COPIED_BYTES = 1 << 28


class Limits(NamedTuple):
    """What an answer must keep to for goodput; None for no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None


NO_LIMITS = Limits()


def bench_serve(
    url: str,
    load: Load,
    *,
    model: str | None = None,
    key: str | None = None,
    limits: Limits = NO_LIMITS,
) -> dict[str, Any]:
    """Drives an OpenAI-compatible server over HTTP and returns what came of it.

    Answers are greedy, and of as many tokens as are asked for where the server knows `ignore_eos`.

    Args:
        url: of the server.
        load: what to ask.
        model: its name in requests; None for the first that the server lists.
        key: API key.
        limits: of goodput.

    Returns:
        Scalars and small dicts for JSON; times in seconds. `ttft_s`, `tpot_s`, `itl_s`, `latency_s`
        and `late_s` (how long after it was due a request was sent) have a mean and percentiles.
        `errors` counts what failed, by what was said; no rate, length or latency counts it.
        `output_tokens_asked` is how many tokens the answers that came were to have, which are fewer
        where a server does not know `ignore_eos`.
        `goodput_requests_per_s` is None without limits. `client_ceiling` is what the client does
        against a server that computes nothing, and `client_load` the largest share of that which
        was needed here. Of a jaxgen server, `decode_gb_per_s` is what each device had to read
        a second to decode, and `decode_roofline` the share of what it could; None where no device
        or other server says.

    Raises:
        UserError: the server cannot be reached, or answers no request at all.
    """
    client = Client(url, key)
    model = model or _first_model(client)
    warmup, asks = load.asks()
    # What the client can do depends on how long answers are.
    tokens = max(1, round(float(np.mean([ask.max_tokens for ask in asks]))))
    ceiling = measure_ceiling(min(load.concurrency, load.num_requests), tokens)

    def requests(asks: Sequence[Ask]) -> list[bytes]:
        asked = {"model": model, "temperature": 0, "ignore_eos": True}
        return [
            client.request(prompt=ask.prompt, max_tokens=ask.max_tokens, **asked) for ask in asks
        ]

    async def run() -> tuple[list[Streamed], dict[str, float], dict[str, float]]:
        async with client:
            _check_any(await drive_closed(client, requests(warmup), load.concurrency))
            measured = requests(asks)
            before = _decoding(client)
            with progress("asking", len(asks), in_bytes=False) as show:
                if load.rate is None:
                    found = await drive_closed(client, measured, load.concurrency, show)
                else:
                    found = await drive_open(client, measured, [ask.due_s for ask in asks], show)
            return found, before, _decoding(client)

    found, before, after = asyncio.run(run())
    _check_any(found)
    is_open = load.rate is not None
    results: dict[str, Any] = {
        "url": client.base,
        "model": model,
        "load": "open" if is_open else "closed",
        **({"rate": load.rate} if is_open else {"concurrency": load.concurrency}),
        "seed": load.seed,
        "shared_prefix": load.shared_prefix,
        "warmup": load.warmup,
        **summarise(found, limits),
        "output_tokens_asked": sum(
            ask.max_tokens for ask, each in zip(asks, found, strict=True) if each.error is None
        ),
    }
    done = {name: after[name] - before.get(name, 0.0) for name in after}
    took = done.get("decode_seconds")
    read, least = done.get("decode_bytes"), done.get("decode_roofline_seconds")
    requests_per_s, tokens_per_s = results["requests_per_s"], results["output_tokens_per_s"]
    return {
        **results,
        "decode_gb_per_s": read / took / 1e9 if took and read else None,
        "decode_roofline": least / took if took and least else None,
        "client_ceiling": ceiling._asdict(),
        "client_load": max(
            requests_per_s / ceiling.requests_per_s, tokens_per_s / ceiling.tokens_per_s
        ),
    }


def bench_own(location: str, options: Sequence[str], load: Load, **given: Any) -> dict[str, Any]:
    """Does what `bench_serve` does to a server of its own, in another process.

    Where that runs on CPU, the roofline is what a loop of copies reaches after it has ended.

    Args:
        location: of a model, as `jaxgen serve` takes it.
        options: of that command.
        load: what to ask.
        **given: to `bench_serve`.

    Raises:
        UserError: the server does not start, or as `bench_serve`.
    """
    with _serving(location, options) as url:
        results = bench_serve(url, load, **given)
    if results["decode_roofline"] is None and results["decode_gb_per_s"] is not None:
        import jax

        devices = jax.devices()
        if devices[0].platform == "cpu":
            # Simulated devices share one memory.
            used = results["decode_gb_per_s"] * len(devices)
            results["copy_gb_per_s"] = copy_bytes_per_s() / 1e9
            results["decode_roofline"] = used / results["copy_gb_per_s"]
    return results


def copy_bytes_per_s() -> float:
    """Returns what all cores together read and write a second when they copy: the best of five."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [np.ones((2, COPIED_BYTES // 8 // (threads or 1))) for _ in range(threads or 1)]
    times = []
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(5):
            begin_s = time.perf_counter()
            list(pool.map(lambda part: np.copyto(part[0], part[1]), parts))
            times.append(time.perf_counter() - begin_s)
    return sum(part.nbytes for part in parts) / min(times)


@contextlib.contextmanager
def _serving(location: str, options: Sequence[str]) -> Iterator[str]:
    """Yields the URL of a server that is ready; the process ends with the context."""
    command = [sys.executable, "-m", "jaxgen", "serve", location, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("ready: "):
                    yield line.split()[-1]
                    break
            else:
                code = process.wait()
                raise UserError(f"jaxgen serve {location} ended with {code} and said why above")
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                process.kill()


def summarise(found: Sequence[Streamed], limits: Limits = NO_LIMITS) -> dict[str, Any]:
    """Returns the measures of some answers, of which at least one is no error."""
    good = [each for each in found if each.error is None]
    duration = max(each.end_s for each in found) - min(each.due_s for each in found)
    inputs = sum(each.prompt_tokens for each in good)
    outputs = sum(each.completion_tokens for each in good)
    kept = [
        (limits.ttft_s is None or each.first_s <= limits.ttft_s)
        and (limits.tpot_s is None or (each.token_s or 0.0) <= limits.tpot_s)
        for each in good
    ]
    spread = {
        "ttft_s": [each.first_s for each in good],
        "tpot_s": [each.token_s for each in good if each.token_s is not None],
        "itl_s": [b - a for each in good for a, b in itertools.pairwise(each.texts_s)],
        "latency_s": [each.end_s - each.due_s for each in good],
        "late_s": [each.sent_s - each.due_s for each in found],
    }
    return {
        "requests": len(found),
        "completed": len(good),
        "errors": _kinds(each.error for each in found if each.error is not None),
        "duration_s": duration,
        "input_tokens": inputs,
        "output_tokens": outputs,
        "requests_per_s": len(good) / duration,
        "output_tokens_per_s": outputs / duration,
        "total_tokens_per_s": (inputs + outputs) / duration,
        "limits": {name: limit for name, limit in limits._asdict().items() if limit is not None},
        "goodput_requests_per_s": sum(kept) / duration if any(limits) else None,
        **{name: _spread(values) for name, values in spread.items()},
    }


def table(results: dict[str, Any]) -> str:
    """Returns the results of `bench_serve` as lines to read."""
    rows = []
    for name, value in results.items():
        if isinstance(value, dict) and "p50" in value:
            rows.append((name.removesuffix("_s"), *(f"{1e3 * x:,.2f}" for x in value.values())))
    facts = {
        "server": f"{results['url']}, model {results['model']}",
        "load": (
            f"open, Poisson, {results['rate']:g} requests/s"
            if "rate" in results
            else f"closed, {results['concurrency']} at a time"
        ),
        "answered": f"{results['completed']:,} of {results['requests']:,}"
        f" in {results['duration_s']:.3g} s, after {results['warmup']} to warm up",
        **{f"failed {count:,}": text for text, count in results["errors"].items()},
        "tokens": f"{results['input_tokens']:,} in, {results['output_tokens']:,} out"
        f" of {results['output_tokens_asked']:,} asked for",
        "requests/s": f"{results['requests_per_s']:,.2f}",
        "output tokens/s": f"{results['output_tokens_per_s']:,.1f}",
        "all tokens/s": f"{results['total_tokens_per_s']:,.1f}",
    }
    if results["limits"]:
        within = ", ".join(f"{k.removesuffix('_s')} {v:g} s" for k, v in results["limits"].items())
        facts["goodput"] = f"{results['goodput_requests_per_s']:,.2f} requests/s within {within}"
    if results["decode_gb_per_s"] is not None:
        share = results["decode_roofline"]
        share = "unknown on this device" if share is None else f"{share:.1%}"
        facts["decode roofline"] = f"{share}; reads {results['decode_gb_per_s']:.4g} GB/s a device"
    ceiling = results["client_ceiling"]
    facts["client"] = (
        f"{results['client_load']:.1%} of the {ceiling['requests_per_s']:,.0f} requests/s and "
        f"{ceiling['tokens_per_s']:,.0f} tokens/s it has time for"
    )
    if results["client_load"] > BUSY:
        facts["client"] += ": TOO BUSY TO MEASURE this server"
    width = max(map(len, facts))
    lines = [f"{label:{width}}  {text}" for label, text in facts.items()]
    header = ("ms", "mean", *(f"p{p}" for p in PERCENTILES))
    return "\n".join([*lines, "", columns(header, rows)])


def shortcomings(results: dict[str, Any]) -> list[str]:
    """Returns a line for each way in which `bench_serve` got less than it asked for."""
    failed, got = results["requests"] - results["completed"], results["output_tokens"]
    lines = []
    if failed:
        lines.append(f"{failed:,} of {results['requests']:,} requests failed; no rate counts them")
    if got < (asked := results["output_tokens_asked"]):
        short = f"answers had {got:,} tokens of the {asked:,} asked for"
        lines.append(f"{short}; use a server that knows ignore_eos to compare rates")
    return lines


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.percentile(values, PERCENTILES).tolist()
    percentiles = {f"p{p}": value for p, value in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(np.mean(values)), **percentiles}


def _kinds(errors: Any) -> dict[str, int]:
    """Counts errors that differ in numbers alone as one, by the first of them."""
    firsts: dict[str, str] = {}
    return dict(Counter(firsts.setdefault(re.sub(r"\d+", "0", each), each) for each in errors))


def _check_any(found: Sequence[Streamed]) -> None:
    if found and all(each.error is not None for each in found):
        kinds = _kinds(each.error for each in found)
        said = "; ".join(f"{count} times {text}" for text, count in kinds.items())
        raise UserError(f"no request was answered: {said}")


def _get(client: Client, path: str) -> bytes:
    # The client that measures takes none from the environment either.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(client.base + path, headers=client.headers)
    with opener.open(request, timeout=10) as response:
        return response.read()


def _first_model(client: Client) -> str:
    try:
        return json.loads(_get(client, "/v1/models"))["data"][0]["id"]
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{client.base}/v1/models says {error.code} {error.reason}; give --name, or a key with "
            "--api-key-file"
        ) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{client.base} cannot be reached ({reason}); start a server there"
        ) from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{client.base}/v1/models lists no model; give --name") from None


def _decoding(client: Client) -> dict[str, float]:
    """What a jaxgen server says of its decoding so far; nothing of another."""
    try:
        text = _get(client, "/metrics").decode("utf-8", "replace")
    except OSError:
        return {}
    pattern = r"^jaxgen_(decode_\w+)_total(?:\{.*\})? (\S+)$"
    return {name: float(value) for name, value in re.findall(pattern, text, re.MULTILINE)}
