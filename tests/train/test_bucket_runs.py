"""Whole runs by the command line in gs:// and s3://: their text, checkpoints and metrics."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from small_runs import run_config

from jaxgen import fields
from jaxgen.checkpoint.manager import CheckpointConfig
from jaxgen.data.sources import Source
from jaxgen.metrics import MetricsConfig
from jaxgen.sharding import MeshConfig
from jaxgen.train.loop import LoopConfig

pytestmark = pytest.mark.full

STEPS, SAVE_EVERY = 30, 10
CONFIG_FILE = """
from jaxgen import TrainConfig
from jaxgen.fields import from_json
config = from_json(TrainConfig, {data!r})
"""
COPY = """
import pathlib, sys
from jaxgen.checkpoint.address import resolve
for path in pathlib.Path(sys.argv[2]).iterdir():
    (resolve(sys.argv[1]) / "texts" / path.name).write_bytes(path.read_bytes())
"""
SHOW = """
import sys
from jaxgen.checkpoint.address import resolve
run = resolve(sys.argv[1]) / "run"
print((run / "metrics.jsonl").read_text())
print(*sorted(path.name for path in (run / "checkpoints").iterdir()), file=sys.stderr)
"""


class Runs:
    """`jaxgen` on one config, whose text is in a folder and in the bucket."""

    def __init__(self, folder, bucket):
        self.folder, self.bucket = folder, bucket
        config = run_config(
            folder,
            MeshConfig(data=2, fsdp=1),
            train=LoopConfig(steps=STEPS, batch_size=8, seq_len=32),
            checkpoint=CheckpointConfig(save_every_steps=SAVE_EVERY),
            metrics=MetricsConfig(log_every_steps=1, tensorboard=False),
        )
        bucket.run_script(COPY, str(folder / "texts"))
        source = Source("text", f"{bucket.url}/texts/*.txt")
        data = dataclasses.replace(config.data, sources=(source,))
        self.local = self._write("local", config)
        self.remote = self._write("remote", dataclasses.replace(config, data=data))
        cache = jax.config.jax_compilation_cache_dir
        self.environ = {"JAX_COMPILATION_CACHE_DIR": cache}

    def _write(self, name, config):
        path = self.folder / f"{name}.py"
        path.write_text(CONFIG_FILE.format(data=fields.to_json(config)))
        return str(path)

    def run(self, *command, **environ):
        command = ["-m", "jaxgen", *command, "--devices", "2"]
        return self.bucket.run(*command, **self.environ, **environ)

    def kill_after(self, step, *command):
        """Kills it when it has printed the line of a step."""
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxgen", *command, "--devices", "2"],
            env=self.bucket.environ | self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while (line := process.stdout.readline()) and f"step {step}/" not in line:
                pass
            process.kill()
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
        assert line, error


@pytest.fixture(scope="module")
def runs(bucket, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), bucket)


def test_a_killed_run_in_a_bucket_ends_as_one_that_was_not(runs):
    straight = runs.folder / "straight"
    done = runs.run("train", runs.local, "--run-dir", str(straight))
    assert done.returncode == 0, done.stderr
    where = f"{runs.bucket.url}/run"
    # The save of a step waits for the one before: that of step 10 is complete.
    runs.kill_after(2 * SAVE_EVERY + 2, "train", runs.remote, "--run-dir", where)
    done = runs.run(
        "train", runs.remote, "--run-dir", where, "--mesh.data", "1", "--mesh.fsdp", "2"
    )
    assert done.returncode == 0, done.stderr
    first = int(re.match(r"step (\d+)/", done.stdout)[1])
    assert first in (SAVE_EVERY + 1, 2 * SAVE_EVERY + 1)

    shown = runs.bucket.run_script(SHOW)
    assert shown.stderr.split() == ["00000020", "00000030"]
    lines = [json.loads(line) for line in shown.stdout.splitlines() if line]
    wanted = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in wanted])

    prompt = ("--prompt", "open", "--max-tokens", "8")
    texts = [runs.run("generate", place, *prompt) for place in (where, str(straight))]
    assert texts[0].returncode == 0, texts[0].stderr
    assert texts[0].stdout.startswith("open")
    assert texts[0].stdout == texts[1].stdout


def refused(done):
    """The one line of a command that must fail for a reason of the user's."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("data: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_no_bucket_is_one_line(runs):
    where = runs.bucket.url.replace("jaxgen", "absent")
    said = refused(runs.run("train", runs.local, "--run-dir", f"{where}/run"))
    assert said == f"jaxgen: {where}/run/checkpoints cannot be used: there is no such bucket"
    said = refused(runs.run("generate", f"{where}/run", "--prompt", "x"))
    assert "absent/run is no run directory and no checkpoint of one" in said
    data = {"--data.sources": json.dumps([{"kind": "text", "path": f"{where}/*.txt"}])}
    said = refused(runs.run("train", runs.local, *sum(data.items(), ())))
    assert f"{where}/*.txt" in said


# The server for gs:// takes anybody.
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            "Unable to locate credentials",
        ),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect to the endpoint URL"),
    ],
)
def test_no_credentials_and_no_answer_are_one_line(runs, environ, reason, tmp_path):
    where = f"{runs.bucket.url}/refused"
    commands = (
        ("train", runs.local, "--run-dir", where),
        ("train", runs.remote, "--run-dir", str(tmp_path / "run")),
        ("generate", where, "--prompt", "x"),
    )
    start = time.perf_counter()
    with ThreadPoolExecutor(len(commands)) as pool:
        for done in pool.map(lambda command: runs.run(*command, **environ), commands):
            assert reason in refused(done)
    assert time.perf_counter() - start < 60


READ = """
import gzip, json, sys
import pyarrow, pyarrow.parquet
from jaxgen.checkpoint.address import resolve
from jaxgen.data.documents import ReadReport, read_documents
from jaxgen.data.sources import Source, list_files
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError

data = resolve(sys.argv[1]) / "kinds"
records = "".join(json.dumps({"text": f"record {i}"}) + "\\n" for i in range(3))
(data / "a.jsonl").write_text(records)
(data / "deep" / "er" / "b.jsonl.gz").write_bytes(gzip.compress(records.encode()))
(data / ".hidden" / "c.jsonl").write_text("never")
with (data / "d.parquet").open("wb") as file:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"]}), file)

def read(kind, path):
    source = Source(kind, f"{sys.argv[1]}/kinds/{path}")
    files = list_files(source)
    assert all(file.version and file.url.startswith(sys.argv[1]) for file in files), files
    return list(read_documents(source, files, ReadReport()))

three = ["record 0", "record 1", "record 2"]
assert read("jsonl", "a.jsonl") == three
assert read("jsonl", "**/*.jsonl*") == 2 * three
assert read("parquet", "d.parquet") == ["x", "y"]
(data / "a.jsonl").write_text(records[: len(records) // 3])
assert read("jsonl", "a.jsonl") == three[:1]
for path in ("no.jsonl", "no/*.jsonl", "deep"):
    try:
        read("jsonl", path)
    except UserError as error:
        print(error)
Tokenizer.from_bytes().save(f"{data}/tokenizer")
assert Tokenizer.load(f"{data}/tokenizer").fingerprint == Tokenizer.from_bytes().fingerprint
"""


def test_every_kind_of_source_is_read_from_a_bucket(bucket):
    said = bucket.run_script(READ).stdout.splitlines()
    assert len(said) == 3
    assert "no.jsonl" in said[0]
    assert "is a folder" in said[2]
