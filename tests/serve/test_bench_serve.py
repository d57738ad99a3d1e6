"""A benchmark told the truth by servers with known delays, failures and clocks."""

import asyncio
import json
import math
import runpy
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_server import DONE, END, HEAD, WHOLE, chunk, faking, plain, text, usage
from serving import running

from jaxgen.cli import main
from jaxgen.errors import UserError
from jaxgen.peaks import Peak
from jaxgen.serve.bench import Limits, bench_serve, shortcomings, summarise, table
from jaxgen.serve.ceiling import measure_ceiling
from jaxgen.serve.client import Client, Streamed, drive_closed, drive_open
from jaxgen.serve.load import Lengths, Load
from jaxgen.serve.roofline import DecodeMeter

# What may pass between a packet's leave and its arrival in another thread of a busy machine.
TRANSPORT_S = 0.15


def send_all(url, number, drive=drive_closed, **given):
    async def run():
        async with Client(url) as client:
            return await drive(client, [client.request(prompt=[i]) for i in range(number)], **given)

    return asyncio.run(run())


def streamed(due, texts, tokens, prompt=10, sent=None, error=None):
    sent = due if sent is None else sent
    return Streamed(due, sent, list(map(float, texts)), texts[-1] + 1.0, prompt, tokens, error)


def test_percentiles_and_rates_are_those_of_the_times():
    # Request i is due at i, has its first text after 1 + i, and 4 tokens a second from then on.
    found = [
        streamed(float(i), [1 + 2 * i, 2 + 2 * i, 4 + 2 * i], tokens=13, sent=i + 0.01 * i)
        for i in range(101)
    ]
    found.append(streamed(3.0, [4], 99, error="HTTP 500: a 7"))
    found.append(streamed(3.0, [4], 99, error="HTTP 500: a 8"))
    got = summarise(found, Limits(ttft_s=51.0, tpot_s=0.25))
    assert (got["requests"], got["completed"]) == (103, 101)
    assert got["errors"] == {"HTTP 500: a 7": 2}
    # From the first due to the last end.
    assert got["duration_s"] == 205
    assert got["requests_per_s"] == 101 / 205
    assert (got["input_tokens"], got["output_tokens"]) == (1010, 1313)
    assert got["output_tokens_per_s"] == 1313 / 205
    assert got["total_tokens_per_s"] == 2323 / 205
    assert got["ttft_s"] == {"mean": 51, "p50": 51, "p90": 91, "p99": 100}
    assert got["tpot_s"] == pytest.approx(dict.fromkeys(("mean", "p50", "p90", "p99"), 0.25))
    assert got["itl_s"] == {"mean": 1.5, "p50": 1.5, "p90": 2, "p99": 2}
    assert got["latency_s"]["p50"] == 55
    assert got["late_s"]["p50"] == pytest.approx(0.01 * np.median([*range(101), 0, 0]))
    # Those of i = 0 to 50.
    assert got["goodput_requests_per_s"] == 51 / 205
    assert summarise(found)["goodput_requests_per_s"] is None
    slow = summarise(found, Limits(tpot_s=0.2))
    assert slow["goodput_requests_per_s"] == 0


def test_an_answer_of_one_token_has_no_time_a_token():
    got = summarise([streamed(0.0, [0.5], 1)], Limits(tpot_s=0.1))
    assert got["tpot_s"] is None
    assert got["itl_s"] is None
    assert got["goodput_requests_per_s"] == pytest.approx(1 / 1.5)
    # No text at all: its end is what the client sees first.
    assert Streamed(1.0, 1.0, [], end_s=3.0).first_s == 2


def test_known_delays_are_what_is_measured():
    firsts, gap, tokens = [0.05 + 0.01 * (i * 7 % 20) for i in range(20)], 0.02, 5
    late = [0.0]

    async def script(body, writer, index):
        at = time.perf_counter()
        writer.write(HEAD)
        for i in range(tokens):
            wait = firsts[body["prompt"][0]] + i * gap - (time.perf_counter() - at)
            await asyncio.sleep(max(0.0, wait))
            nominal = firsts[body["prompt"][0]] + i * gap
            late.append(time.perf_counter() - at - nominal)
            writer.write(chunk(text("x")))
        writer.write(chunk(text("", "length") + usage(7, tokens) + DONE) + END)

    with faking(script) as fake:
        found = send_all(fake.url, 20, concurrency=4)
    got = summarise(found)
    # A percentile moves by at most what the largest of the single times does.
    slack = max(late) + TRANSPORT_S
    for p in (50, 90, 99):
        first = np.percentile(firsts, p)
        assert first <= got["ttft_s"][f"p{p}"] <= first + slack
    assert abs(got["tpot_s"]["mean"] - gap) <= 2 * slack / (tokens - 1)
    assert abs(got["itl_s"]["mean"] - gap) <= 2 * slack / (tokens - 1)
    assert got["itl_s"]["p50"] == pytest.approx(gap, abs=slack)
    assert (got["input_tokens"], got["output_tokens"]) == (140, 100)
    # Four clients share the work, each of which takes its delays and no more than the slack.
    busy = [each + (tokens - 1) * gap for each in firsts]
    assert sum(busy) / 4 <= got["duration_s"] <= sum(busy) / 4 + max(busy) + 5 * slack
    assert got["requests_per_s"] == 20 / got["duration_s"]
    assert fake.connections == 4


def test_an_open_load_waits_for_no_answer():
    number = 30
    together = asyncio.Event()

    async def script(body, writer, index):
        # Nobody is answered before all have asked.
        if index == number - 1:
            together.set()
        await asyncio.wait_for(together.wait(), 20)
        writer.write(HEAD + chunk(WHOLE) + END)

    due = Load(num_requests=number, rate=60.0).due_s().tolist()
    with faking(script) as fake:
        found = send_all(fake.url, number, drive_open, due_s=due)
    assert not any(each.error for each in found)
    assert fake.connections == number
    # Each came when it was due, and its time counts from then.
    begin = found[0].due_s
    assert [each.due_s - begin for each in found] == pytest.approx(due)
    for asked, each in zip(sorted(fake.asked_s), found, strict=True):
        assert 0 <= asked - each.due_s <= max(e.sent_s - e.due_s for e in found) + TRANSPORT_S
        assert each.first_s >= fake.asked_s[-1] - each.due_s


def test_what_a_late_client_loses_counts():
    async def script(body, writer, index):
        writer.write(HEAD + chunk(WHOLE) + END)

    with faking(script) as fake:
        # All are due before they can be sent.
        found = send_all(fake.url, 3, drive_open, due_s=[-2.0, -2.0, -1.0])
    got = summarise(found)
    assert [each.first_s >= late for each, late in zip(found, (2, 2, 1), strict=True)] == [True] * 3
    assert got["late_s"]["p50"] >= 2
    assert got["ttft_s"]["p50"] >= 2


@pytest.mark.parametrize("way", ["bytes", "lines", "length", "close"])
def test_answers_are_read_however_they_are_cut(way):
    async def script(body, writer, index):
        if way == "length":
            return writer.write(plain(200, WHOLE.decode()))
        if way == "close":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + WHOLE.replace(b"\n", b"\r\n"))
            return writer.close()
        pieces = [b":\n\n", *WHOLE.splitlines(keepends=True)] if way == "lines" else [WHOLE]
        sent = HEAD + b"".join(map(chunk, pieces)) + END
        for i in range(0, len(sent), 1 if way == "bytes" else len(sent)):
            writer.write(sent[i : i + 1] if way == "bytes" else sent)
            await asyncio.sleep(0)

    with faking(script) as fake:
        found = send_all(fake.url, 2, concurrency=1)
    for each in found:
        assert each.error is None
        assert (len(each.texts_s), each.prompt_tokens, each.completion_tokens) == (2, 5, 3)
        assert each.due_s <= each.sent_s < each.texts_s[0] <= each.texts_s[1] <= each.end_s
    assert fake.connections == (2 if way == "close" else 1)
    assert fake.bodies[1] == {
        "prompt": [1],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


FAILURES = {
    "HTTP 429: full; try later": plain(429, '{"error": {"message": "full; try\\n later"}}'),
    "HTTP 500: no JSON": plain(500, "no JSON"),
    "the stream says: the engine has failed": HEAD
    + chunk(text("a") + b'data: {"error": {"message": "the engine has failed"}}\n\n' + DONE)
    + END,
    "the stream ended before the answer": HEAD + chunk(text("a")) + END,
    "the stream has no usage, so its tokens cannot be counted": HEAD
    + chunk(text("a", "stop") + DONE)
    + END,
    "the answer cannot be read: JSONDecodeError": HEAD + chunk(b"data: {\n\n") + END,
    "the answer cannot be read: ClientResponseError": b"HTTP/1.1 none\r\n\r\n",
    "the server closed the connection without an answer": b"",
}


def test_failures_are_counted_and_told():
    wrong = list(FAILURES.values())

    async def script(body, writer, index):
        at = body["prompt"][0]
        writer.write(wrong[at] if at < len(wrong) else HEAD + chunk(WHOLE) + END)
        if wrong[at : at + 1] == [b""]:
            writer.close()

    with faking(script) as fake:
        found = send_all(fake.url, len(wrong) + 2, concurrency=1)
    for each, expected in zip(found, FAILURES, strict=False):
        assert each.error is not None
        assert each.error.startswith(expected)
    got = summarise(found)
    assert (got["completed"], sum(got["errors"].values())) == (2, len(wrong))
    assert got["output_tokens"] == 6


def test_a_connection_that_the_server_has_dropped_is_made_anew():
    async def script(body, writer, index):
        writer.write(HEAD + chunk(WHOLE) + END)
        await writer.drain()
        writer.close()

    with faking(script) as fake:
        found = send_all(fake.url, 5, concurrency=1)
    assert not any(each.error for each in found)
    assert fake.connections == len(fake.bodies) == 5


@pytest.mark.parametrize("way", ["close", "abort"])
def test_an_answer_that_is_cut_is_not_asked_for_again(way):
    async def script(body, writer, index):
        writer.write(HEAD + chunk(text("a")))
        await writer.drain()
        getattr(writer.transport, way)()

    with faking(script) as fake:
        (found,) = send_all(fake.url, 1, concurrency=1)
    assert found.error == "the stream ended before the answer"
    assert len(found.texts_s) <= len(fake.bodies) == 1


def test_silence_is_a_failure(monkeypatch):
    async def script(body, writer, index):
        writer.write(HEAD + chunk(text("a")))
        await asyncio.sleep(60)

    monkeypatch.setattr("jaxgen.serve.client.SILENCE_S", 0.2)
    with faking(script) as fake:
        (found,) = send_all(fake.url, 1, concurrency=1)
    assert found.error == "nothing came for 0.2 s"


def test_a_server_that_answers_nothing_is_one_line():
    async def script(body, writer, index):
        writer.write(plain(400, f'{{"error": {{"message": "{body["prompt"][0]} is no token"}}}}'))

    load = Load(num_requests=3, warmup=2, concurrency=2)
    with faking(script) as fake, pytest.raises(UserError) as error:
        bench_serve(fake.url, load)
    assert str(error.value).startswith("no request was answered: 2 times HTTP 400: ")
    assert len(fake.bodies) == 2
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 cannot be reached \(.*refused"):
        bench_serve("http://127.0.0.1:9", load)
    for url in ("127.0.0.1:9", "ftp://x", "http://x:y", "http://"):
        with pytest.raises(UserError, match="is no server's; give one such as"):
            bench_serve(url, load)


def test_the_client_has_a_ceiling():
    ceiling = measure_ceiling(2, 50)
    assert ceiling.tokens_per_s == pytest.approx(50 * ceiling.requests_per_s)
    assert ceiling.requests_per_s > 1


@pytest.mark.parametrize("rate", [None, 200.0])
def test_a_server_of_ours_is_measured(rate, monkeypatch):
    monkeypatch.setattr("jaxgen.serve.ceiling.EVENTS", 500)
    lengths = Lengths(20, 40)
    load = Load(
        num_requests=24,
        rate=rate,
        concurrency=6,
        input_tokens=lengths,
        output_tokens=Lengths(5, 15),
        shared_prefix=32,
        vocab_size=128,
    )
    with running(step_s=0.002) as server:
        if rate is not None:  # As on a device whose peak is known: a byte takes a microsecond.
            cost = server.engine._core.meter._cost
            server.engine._core.meter = DecodeMeter(cost, 1, Peak(flops=1e9, bytes_per_s=1e6))
        got = bench_serve(f"{server.url}/v1/", load, limits=Limits(ttft_s=60.0))
        assert server.metric("jaxgen_prefix_cache_hit_tokens_total") >= 24 * 32
        assert server.metric("jaxgen_decode_seconds_total") > 0
        stats = server.engine.stats()
        assert stats.decode_bytes == server.metric("jaxgen_decode_bytes_total") > 0
        fraction = server.metric("jaxgen_decode_roofline_fraction")
        assert fraction == (stats.roofline_fraction or 0)
    _, asks = load.asks()
    assert (got["model"], got["url"]) == ("echo", server.url)
    assert (got["completed"], got["errors"]) == (24, {})
    assert got["input_tokens"] == sum(len(ask.prompt) for ask in asks)
    assert got["output_tokens"] == sum(ask.max_tokens for ask in asks)
    assert got["output_tokens_asked"] == got["output_tokens"]
    assert shortcomings(got) == []
    assert got["goodput_requests_per_s"] == got["requests_per_s"]
    assert 0 < got["ttft_s"]["p50"] < got["latency_s"]["p50"]
    assert got["decode_gb_per_s"] > 0
    if rate is None:
        assert (got["decode_roofline"], fraction) == (None, 0)
    else:
        assert got["decode_roofline"] == pytest.approx(got["decode_gb_per_s"] * 1e9 / 1e6)
        assert 0 < fraction < 1
    assert got["client_load"] > 0
    assert json.loads(json.dumps(got)) == got
    lines = table(got).splitlines()
    kind = "closed, 6 at a time" if rate is None else "open, Poisson, 200 requests/s"
    assert any(line.split(maxsplit=1) == ["load", kind] for line in lines)
    assert lines[-6].split() == ["ms", "mean", "p50", "p90", "p99"]
    assert [line.split()[0] for line in lines[-5:]] == ["ttft", "tpot", "itl", "latency", "late"]
    if rate is not None:
        assert got["duration_s"] >= asks[-1].due_s


@pytest.mark.parametrize("fails", [True, False])
def test_a_script_is_told_of_failures_and_of_short_answers(fails, monkeypatch, capsys):
    monkeypatch.setattr("jaxgen.serve.ceiling.EVENTS", 50)

    async def script(body, writer, index):
        # Of the eight tokens asked for, three.
        writer.write(plain(429, "full") if fails and index else HEAD + chunk(WHOLE) + END)

    with faking(script) as fake:
        asked = ["--num-requests=4", "--warmup=0", "--output-tokens=8", "--json"]
        code = main(["bench", "serve", "--url", fake.url, *asked])
    out, err = capsys.readouterr()
    got, good = json.loads(out), 1 if fails else 4
    assert (got["output_tokens"], got["output_tokens_asked"]) == (3 * good, 8 * good)
    lines = [f"jaxgen: answers had {3 * good} tokens of the {8 * good} asked for; use a server"]
    if fails:
        lines.insert(0, "jaxgen: 3 of 4 requests failed; no rate counts them")
    for line, begin in zip(err.splitlines()[-len(lines) :], lines, strict=True):
        assert line.startswith(begin)
    assert code == int(fails)
    words = f"{got['input_tokens']:,} in, {3 * good} out of {8 * good} asked for"
    assert words in table(got)


@pytest.mark.full
def test_the_command_starts_a_server_of_a_model(tmp_path, monkeypatch, capfd):
    write_folder = runpy.run_path(
        str(Path(__file__).parent.parent / "formats" / "small_folders.py")
    )["write_folder"]
    write_folder(tmp_path / "small")
    for name, value in {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }.items():
        monkeypatch.setenv(name, value)
    # The programs of test_server.py.
    settings = ["--engine.max_num_seqs=2", "--engine.prefill_chunk=16", "--engine.kv_blocks=8"]
    lengths = ["--input-tokens=5:30", "--output-tokens=8", "--num-requests=6", "--concurrency=2"]
    asked = ["bench", "serve", str(tmp_path / "small"), *settings, *lengths, "--json"]
    assert main(asked) == 0
    out, _ = capfd.readouterr()
    got = json.loads(out)
    assert (got["model"], got["completed"], got["errors"]) == ("small", 6, {})
    assert got["output_tokens"] == 48
    # The server has one device, and this process eight.
    assert got["decode_roofline"] == pytest.approx(
        8 * got["decode_gb_per_s"] / got["copy_gb_per_s"]
    )
    assert 0 < got["decode_roofline"] < 8
    assert math.isfinite(got["copy_gb_per_s"])


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "jaxgen: bench serve needs one of MODEL, to serve it, and --url of a server"),
        (["--url", "http://x", "--rate", "1", "--concurrency", "2"], "--rate is of an open load"),
        (["--url", "http://x", "--output-tokens", "many"], "--output-tokens many: expected a num"),
        (["--url", "http://x", "--max-ttft", "0"], "--max-ttft 0.0; use seconds, above 0"),
        (["--url", "http://x", "--engine.burst", "4"], "no field --engine.burst"),
    ],
)
def test_mistakes_are_one_line(argv, line, capsys):
    assert main(["bench", "serve", *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err
