import dataclasses
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import corpus
import pytest

from jaxgen.data import cache, dataset
from jaxgen.data.config import DataConfig
from jaxgen.data.dataset import prepare
from jaxgen.data.sources import Source
from jaxgen.errors import UserError


@pytest.fixture
def counted(monkeypatch):
    """Counts how often rows are packed."""
    calls = []

    def count(*args, **kwargs):
        calls.append(1)
        return pack(*args, **kwargs)

    pack = dataset.pack_documents
    monkeypatch.setattr(dataset, "pack_documents", count)
    return calls


def test_packed_once_and_again_when_something_changes(tmp_path, counted):
    config = corpus.config(tmp_path)
    first = prepare(config, 64)
    again = prepare(config, 64)
    assert len(counted) == 1
    assert first.fingerprint == again.fingerprint
    assert first.manifests == again.manifests
    # What only orders or weighs rows packs nothing, but is another stream.
    reordered = prepare(dataclasses.replace(config, shuffle_seed=1), 64)
    assert len(counted) == 1
    assert reordered.fingerprint != first.fingerprint
    for change in ({"eval_fraction": 0.2}, {"tokenizer": "bpe", "bpe_vocab_size": 300}):
        prepare(dataclasses.replace(config, **change), 64)
    prepare(config, 32)
    (tmp_path / "texts" / "new.txt").write_text("more")
    prepare(config, 64)
    assert len(counted) == 5


def test_the_same_files_elsewhere_give_the_same_rows(tmp_path):
    one = prepare(corpus.config(tmp_path / "a", tokenizer="bpe", bpe_vocab_size=300), 64)
    two = prepare(corpus.config(tmp_path / "b", tokenizer="bpe", bpe_vocab_size=300), 64)
    assert one.folders != two.folders
    assert one.fingerprint == two.fingerprint
    assert one.eval_bytes_per_token == two.eval_bytes_per_token > 1


def test_the_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    config = dataclasses.replace(corpus.config(tmp_path), cache_dir="")
    (folder,) = prepare(config, 64).folders
    assert folder.parent == tmp_path / "xdg" / "jaxgen" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.default_cache_dir() == pathlib.Path.home() / ".cache" / "jaxgen" / "data"


def test_standard_error_says_what_was_done_and_left_out(tmp_path, capfd):
    config = corpus.config(tmp_path)
    (tmp_path / "texts" / "latin.txt").write_bytes(b"\xe9")
    prepare(config, 64)
    done, left_out = capfd.readouterr().err.splitlines()
    assert done.startswith(f"data: packed {tmp_path}")
    assert "left out 1 documents" in left_out
    assert "latin.txt" in left_out
    prepare(config, 64)
    assert capfd.readouterr().err == ""


def test_a_terminal_gets_a_progress_bar(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    prepared = prepare(corpus.config(tmp_path), 64)
    assert "packing" in capfd.readouterr().err
    assert prepared.manifests[0].documents == 60


def test_rows_packed_elsewhere(tmp_path):
    config = corpus.config(tmp_path)
    made = prepare(config, 64)
    moved = made.folders[0].rename(tmp_path / "moved")
    source = Source(kind="packed", path=str(moved))
    packed = dataclasses.replace(config, sources=(source,), tokenizer=str(moved))
    there = prepare(packed, 64)
    assert there.fingerprint == made.fingerprint
    assert there.train[0][3][0].tolist() == prepare(config, 64).train[0][3][0].tolist()
    with pytest.raises(UserError, match=r"seq_len=128 is longer than the packed rows of .*64"):
        prepare(packed, 128)
    other = dataclasses.replace(packed, tokenizer="bytes")
    assert prepare(other, 64).fingerprint == made.fingerprint
    bpe = prepare(dataclasses.replace(config, tokenizer="bpe", bpe_vocab_size=300), 64)
    foreign = dataclasses.replace(packed, tokenizer=str(bpe.folders[0]))
    with pytest.raises(UserError, match=r"was packed with another tokenizer; set data.tokenizer="):
        prepare(foreign, 64)
    with pytest.raises(UserError, match="is not a folder of packed rows"):
        prepare(dataclasses.replace(packed, sources=(Source("packed", str(tmp_path)),)), 64)


def test_a_failure_leaves_nothing(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n{')
    config = DataConfig((Source("jsonl", f"{folder}/*.jsonl"),), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="is not JSON"):
        prepare(config, 64)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    (folder / "a.jsonl").write_text(" \n")
    with pytest.raises(UserError, match="holds no text: 1 files"):
        prepare(config, 64)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
import corpus, pathlib
from jaxgen.data import dataset
def stop_before_the_end(texts, *args, **kwargs):
    def slow():
        yield from texts
        print("packing", flush=True)
        time.sleep(60)
    return pack(slow(), *args, **kwargs)
pack, dataset.pack_documents = dataset.pack_documents, stop_before_the_end
dataset.prepare(corpus.config(pathlib.Path(sys.argv[2])), 64)
"""


def test_a_killed_pack_is_not_taken_for_whole(tmp_path, capfd):
    command = [sys.executable, "-c", KILLED, str(pathlib.Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"packing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert left == {".lock", ".partial"}
    # The lock died with its holder: this packs at once, and without what is left there.
    packed = prepare(corpus.config(tmp_path), 64)
    assert packed.manifests[0].documents == 60
    assert "waiting" not in capfd.readouterr().err
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock", ""}


def build_slowly(folder, log, start):
    start.wait()

    def build(partial):
        with open(log, "a") as file:
            file.write("built\n")
        (partial / "half").write_text("1")
        time.sleep(0.3)
        (partial / "whole").write_text("2")

    cache.build_once(folder, build)
    assert sorted(path.name for path in folder.iterdir()) == ["half", "whole"]


def test_of_racing_processes_one_builds(tmp_path):
    context = multiprocessing.get_context("forkserver")
    start = context.Event()
    arguments = (tmp_path / "cache" / "x", str(tmp_path / "log"), start)
    processes = [context.Process(target=build_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(corpus.config(tmp_path), cache_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write the data cache at .*set data.cache_dir"):
        prepare(config, 64)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgen.data.pack.shard_name", lambda split, number: "/dev/full")
    with pytest.raises(UserError, match=r"cannot write the data cache at .*No space left"):
        prepare(corpus.config(tmp_path), 64)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"sources": ()}, "data.sources is empty"),
        ({"eval_fraction": 1.0}, r"data\.eval_fraction=1\.0"),
        ({"prefetch": 0}, "data.prefetch=0"),
        ({"cache_dir": "gs://bucket/x"}, "use a folder on this machine"),
    ],
)
def test_a_config_that_cannot_be(fields, line):
    with pytest.raises(UserError, match=line):
        DataConfig(**fields)


def test_bad_input_of_prepare(tmp_path):
    config = corpus.config(tmp_path)
    with pytest.raises(UserError, match="at least 2 tokens"):
        prepare(config, 1)
    with pytest.raises(UserError, match="does not exist"):
        prepare(dataclasses.replace(config, tokenizer=str(tmp_path / "no.json")), 64)
    with pytest.raises(UserError, match="no file matches"):
        prepare(dataclasses.replace(config, sources=(Source("text", str(tmp_path / "no")),)), 64)


def test_no_tokenizer_is_trained_on_nothing(tmp_path):
    (tmp_path / "empty.txt").touch()
    source = Source(kind="text", path=str(tmp_path / "*.txt"))
    cache = tmp_path / "cache"
    config = DataConfig(sources=(source,), tokenizer="bpe", cache_dir=str(cache))
    with pytest.raises(UserError, match="holds no text"):
        prepare(config, 16)
    assert not cache.exists()
