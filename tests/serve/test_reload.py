"""Weights replaced while requests run: who is answered by which, and what stays if they are bad."""

import dataclasses
import gc
import json
import runpy
import threading
from pathlib import Path

import httpx
import jax
import numpy as np
import pytest
from serving import running, wait_for
from small_model import CONFIG, ONE, make, mesh_of

from jaxgen.errors import UserError
from jaxgen.pretrained import load_model, open_model
from jaxgen.serve.admin import describe
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.engine import Engine
from jaxgen.serve.generate import Generator
from jaxgen.serve.reload import Reloaded, ReloadRunning
from jaxgen.serve.request import SamplingConfig
from jaxgen.serve.weights import for_serving
from jaxgen.sharding import MeshConfig, make_mesh

SETTINGS = EngineConfig(max_num_seqs=4, prefill_chunk=16, block_size=8, kv_blocks=80)
FOLDERS = runpy.run_path(str(Path(__file__).parents[1] / "formats" / "small_folders.py"))


def requests(count):
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, CONFIG.vocab_size, 30).tolist() for _ in range(count)]
    drawn = [{}, {"temperature": 0.9, "top_k": 40}]
    samplings = [SamplingConfig(max_tokens=60, seed=i, **drawn[i % 2]) for i in range(count)]
    return prompts, samplings


def test_each_token_is_drawn_by_one_set_of_weights_from_all_text_before_it(monkeypatch):
    """Two engines that know nothing of reloads say what the one that reloads must."""
    with jax.set_mesh(mesh_of(ONE)):
        old, new = (Generator(make(seed=seed), config=SETTINGS) for seed in (0, 1))
        engine = Engine(make(seed=0), config=SETTINGS)
    prompts, samplings = requests(11)
    cached, greedy = prompts.pop(), samplings.pop()
    cut, core, restart, step = {}, engine._core, engine._core.scheduler.restart, engine._core.step

    def until_there_are_others():
        if core.tokens_generated > 60 + 100:  # Some have ended, some have begun, others wait.
            wait_for(lambda: core.reloads or engine._staged)
        return step()

    def noting(salt):
        cut.update({answer: len(request.output) for request, answer in engine._answers.items()})
        restart(salt)

    def ask():
        found = engine.stats().prompt_tokens_found
        tokens = engine.generate([cached], greedy)[0].tokens
        return tokens, engine.stats().prompt_tokens_found - found

    monkeypatch.setattr(core.scheduler, "restart", noting)
    with engine, jax.set_mesh(mesh_of(ONE)):
        assert ask() == (old([cached], greedy)[0], 0)
        monkeypatch.setattr(core, "step", until_there_are_others)
        answers = [engine.submit(p, s) for p, s in zip(prompts, samplings, strict=True)]
        done = engine.reload(make(seed=1))
        results = [answer.result().tokens for answer in answers]
        # Nothing is found of what the old weights have read; and then all but the last block.
        assert [ask(), ask()] == [(new([cached], greedy)[0], n) for n in (0, 24)]
        stats = engine.stats()
        by_old = old(prompts, samplings)
        cuts = [min(cut.get(answer, 60), 60) for answer in answers]
        assert 0 in cuts
        assert sum(0 < k < 60 for k in cuts) >= 2
        rests = [(i, k) for i, k in enumerate(cuts) if k < 60]
        by_new = new(
            [prompts[i] + by_old[i][:k] for i, k in rests],
            [dataclasses.replace(samplings[i], max_tokens=60 - k) for i, k in rests],
        )
        expected = by_old[:]
        for (i, k), rest in zip(rests, by_new, strict=True):
            expected[i] = by_old[i][:k] + rest
    assert results == expected
    assert done.weight_version == stats.weight_version == "1"
    assert (stats.reloads, stats.recompiles, stats.blocks_used) == (1, 0, 0)
    assert 0 < done.pause_s < 5


def held(devices):
    """The most bytes of arrays on one of some devices."""
    on = dict.fromkeys(devices, 0)
    for array in jax.live_arrays():
        for device in array.sharding.device_set & on.keys():
            shape = array.sharding.shard_shape(array.shape)
            on[device] += int(np.prod(shape)) * array.dtype.itemsize
    return max(on.values())


def test_no_device_holds_more_than_one_model_and_one_array(monkeypatch):
    devices = jax.devices()[4:]
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices)
    config = dataclasses.replace(CONFIG, embed_dim=64, mlp_dim=128)
    settings = dataclasses.replace(SETTINGS, max_num_seqs=2, kv_blocks=16)
    with jax.set_mesh(mesh_of(ONE)):
        other = make(config, seed=1)
        expected = jax.tree.leaves(for_serving(other))
    with jax.set_mesh(mesh), Engine(make(config), config=settings) as engine:
        leaves = engine._core.runner._weights
        largest = max(leaf.sharding.shard_shape(leaf.shape) for leaf in leaves)
        model = sum(int(np.prod(x.sharding.shard_shape(x.shape))) * 4 for x in leaves)
        largest = int(np.prod(largest)) * 4
        assert model > 8 * largest
        del leaves
        gc.collect()
        before, peaks, put = held(devices), [], jax.device_put

        def watched(value, where=None, **more):
            result = put(value, where, **more)
            peaks.append(held(devices))
            return result

        monkeypatch.setattr(jax, "device_put", watched)
        moves = []
        monkeypatch.setattr(engine, "_move", lambda: moves.append(1))
        engine.reload(other)
        monkeypatch.undo()
        # It is well for as long as arrays come.
        assert len(moves) >= len(engine._core.runner._weights)
        assert len(peaks) > len(engine._core.runner._weights)
        assert before <= max(peaks) <= before + largest
        assert held(devices) == before
        for leaf, wanted in zip(engine._core.runner._weights, expected, strict=True):
            assert np.array_equal(leaf, wanted)


def test_what_goes_wrong_while_weights_are_replaced_reaches_who_asked(monkeypatch):
    with jax.set_mesh(mesh_of(ONE)):
        config = dataclasses.replace(SETTINGS, max_num_seqs=1)
        first, second = (Engine(make(), config=config) for _ in range(2))
        other = make(seed=1)

    def broken(*_):
        raise RuntimeError("the device is gone")

    def when_staged(engine, act):
        stage = engine._core.stage
        monkeypatch.setattr(engine._core, "stage", lambda *args: (stage(*args), act())[0])

    answers = []
    monkeypatch.setattr(first._core.runner, "replace", broken)
    when_staged(first, lambda: answers.append(first.submit([1], SamplingConfig(max_tokens=100))))
    with pytest.raises(RuntimeError, match="the device is gone"):
        first.reload(other)
    with pytest.raises(RuntimeError, match="the device is gone"):
        answers[0].result()
    first.close()
    when_staged(second, second.close)
    with pytest.raises(UserError, match="the engine is closed"):
        second.reload(other)


KEY = {"Authorization": "Bearer admin key"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of models: two that may replace each other, and others that may not."""
    root, write, llama = (
        tmp_path_factory.mktemp("models"),
        *map(FOLDERS.get, ("write_folder", "LLAMA")),
    )
    tensors = FOLDERS["llama_tensors"]
    write(root / "a")
    write(root / "b", tensors=tensors(seed=1), generation={"eos_token_id": [257, 9]})
    deep = llama | {"num_hidden_layers": 3, "rope_theta": 5000.0}
    write(root / "deep", deep)
    write(root / "short")
    file = root / "short" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    nan = tensors(seed=1)
    nan["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write(root / "nan", tensors=nan)
    lacking = tensors(seed=1)
    del lacking["model.norm.weight"]
    write(root / "lacking", tensors=lacking)
    write(root / "words")
    words = json.loads((root / "words" / "tokenizer.json").read_text())
    words["added_tokens"].append(words["added_tokens"][-1] | {"id": 270, "content": "<|more|>"})
    (root / "words" / "tokenizer.json").write_text(json.dumps(words))
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def server(folders):
    source, mesh = open_model(folders / "a"), mesh_of(ONE)
    model, tokenizer = load_model(source, source.serve_config(MeshConfig()), mesh)
    settings = dataclasses.replace(SETTINGS, max_queued_requests=200)
    with jax.set_mesh(mesh):
        engine = Engine(model, tokenizer, settings, weight_version=source.fingerprint)
    with (
        engine,
        running(
            keys=["user key"],
            admin_keys=["other", "admin key"],
            model=describe("small", source, engine),
            engine=engine,
        ) as found,
    ):
        found.http.headers["Authorization"] = "Bearer user key"
        yield found


def load(server, folder, **more):
    body = json.dumps({"model": str(folder)} | more)
    headers = KEY | {"Content-Type": "application/json"}
    return server.http.post("/admin/reload", content=body, headers=headers)


def answer(server, **more):
    body = {"prompt": "hello", "max_tokens": 20, "temperature": 0, "ignore_eos": True} | more
    return server.post("/v1/completions", body).json()["choices"][0]["text"]


def shown(server):
    """The version of the weights, which three places say alike."""
    (model,) = server.http.get("/v1/models").json()["data"]
    assert server.metric(
        f'jaxgen_weights_info{{model_name="small",version="{model["weight_version"]}"}}'
    )
    assert server.engine.stats().weight_version == model["weight_version"]
    return model["weight_version"]


def test_nobody_may_without_an_admin_key(server, folders):
    body = {"model": str(folders / "b")}
    before = shown(server)
    assert server.post("/admin/reload", body).status_code == 401  # A user's key.
    for key in ("", "Bearer", "Bearer admin", "Basic admin key"):
        answer = server.http.post("/admin/reload", json=body, headers={"Authorization": key})
        assert answer.status_code == 401
    assert server.http.get("/v1/models", headers=KEY).status_code == 401
    assert server.http.get("/admin/reload", headers=KEY).status_code == 405
    assert server.http.post("/admin/else", json=body, headers=KEY).status_code == 404
    assert shown(server) == before
    with running() as open_to_all:
        for headers in ({}, KEY):
            answer = open_to_all.http.post("/admin/reload", json=body, headers=headers)
            assert answer.status_code == 403
            assert "start it with --admin-key-file FILE" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("deep", "num_layers=3 where the running model has 2, rope_theta=5000.0 where"),
        ("short", "model.safetensors"),
        ("nan", "not finite"),
        ("lacking", "model.norm.weight"),
        ("words", "another tokenizer"),
        ("empty", "is no model"),
        ("none", "is no model"),
        ("a/config.json", "is no model"),
    ],
)
def test_what_cannot_replace_the_weights_changes_nothing(server, folders, folder, words):
    version, text = shown(server), answer(server)
    refused = load(server, folders / folder)
    assert refused.status_code == 400
    assert words in refused.json()["error"]["message"]
    assert (shown(server), answer(server)) == (version, text)


def test_bodies_that_say_nothing_are_refused(server):
    for body in (
        {},
        {"model": 3},
        {"model": ""},
        {"model": "x", "draft": ""},
        {"model": "x", "more": 1},
        [],
    ):
        headers = KEY | {"Content-Type": "application/json"}
        refused = server.http.post("/admin/reload", content=json.dumps(body), headers=headers)
        assert refused.status_code == 400


def test_a_draft_model_is_replaced_where_the_body_says_so(server, folders, monkeypatch):
    refused = load(server, folders / "b", draft=str(folders / "b"))
    assert refused.status_code == 400
    assert "there is no draft model to replace" in refused.json()["error"]["message"]
    config, asked = dataclasses.replace(server.engine.config, speculation="draft"), []
    monkeypatch.setattr(server.engine._core, "config", config)
    monkeypatch.setattr(
        server.engine,
        "reload",
        lambda source, draft: asked.append((source.location, draft)) or Reloaded("1", 0.0, 0.0),
    )
    a, b = (str(folders / name) for name in "ab")
    assert load(server, a).json()["draft"] == "kept"
    assert load(server, a, draft=b).json()["draft"] == "replaced"
    assert asked == [(a, None), (a, b)]


def test_one_at_a_time(server, folders):
    assert server.engine._reloading.acquire(blocking=False)
    refused = load(server, folders / "b")
    with pytest.raises(ReloadRunning, match="are being loaded already"):
        server.engine.reload(folders / "b")
    server.engine._reloading.release()
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_running")
    assert int(refused.headers["retry-after"]) > 0


def test_weights_change_under_traffic_and_every_request_is_answered(server, folders):
    versions = {name: open_model(folders / name).fingerprint for name in "ab"}
    texts = {}
    for name in "ba":
        assert load(server, folders / name).json()["weight_version"] == versions[name]
        texts[name] = answer(server)
    assert texts["a"] != texts["b"]
    made, stop = [], threading.Event()

    def ask(n):
        with httpx.Client(base_url=server.url, headers=server.http.headers, timeout=60) as client:
            while not stop.is_set():
                body = {"prompt": f"{n}" * (n + 1), "max_tokens": 40, "ignore_eos": True}
                got = client.post("/v1/completions", json=body)
                made.append((got.status_code, got.json()["usage"]["completion_tokens"]))

    clients = [threading.Thread(target=ask, args=[n]) for n in range(8)]
    for client in clients:
        client.start()
    before = server.metric("jaxgen_reloads_total")
    for name in "babab":
        count = len(made)
        wait_for(lambda least=count + 4: len(made) >= least)
        done = load(server, folders / name).json()
        assert done["weight_version"] == shown(server) == versions[name]
        assert done["previous_version"] != done["weight_version"]
        assert answer(server) == texts[name]
    stop.set()
    for client in clients:
        client.join()
    assert len(made) >= 20
    assert set(made) == {(200, 40)}
    assert server.metric("jaxgen_reloads_total") == before + 5
    assert server.metric("jaxgen_recompiles_total") == 0
    wait_for(lambda: server.engine.stats().blocks_used == 0)


def test_the_new_models_ends_of_text_count(server, folders):
    for name, ends in (("a", (257,)), ("b", (257, 9))):
        load(server, folders / name)
        assert server.api.taking()[0].stop_ids == ends
