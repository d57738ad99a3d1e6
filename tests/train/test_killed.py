"""Real processes of one run, killed at any moment: nothing lost, nothing twice, nothing else."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import pytest
from small_runs import run_config

from jaxgen import fields
from jaxgen.checkpoint.manager import CheckpointConfig
from jaxgen.sharding import MeshConfig
from jaxgen.train.evaluate import EvalConfig
from jaxgen.train.loop import LoopConfig

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY = 36, 3
CONFIG_FILE = """
from jaxgen import TrainConfig
from jaxgen.fields import from_json
config = from_json(TrainConfig, {data!r})
"""


class Runs:
    """Starts `jaxgen train` of one config, as often as it takes, in one directory or another."""

    def __init__(self, folder):
        config = run_config(
            folder,
            MeshConfig(data=2, fsdp=1),
            train=LoopConfig(steps=STEPS, batch_size=8, seq_len=32),
            eval=EvalConfig(every_steps=12, batches=1),
            checkpoint=CheckpointConfig(save_every_steps=SAVE_EVERY),
        )
        self.folder, self.file = folder, folder / "small.py"
        self.file.write_text(CONFIG_FILE.format(data=fields.to_json(config)))

    def start(self, name):
        command = [sys.executable, "-m", "jaxgen", "train", str(self.file), "--devices", "2"]
        return subprocess.Popen(
            [*command, "--run-dir", str(self.folder / name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
        )

    def text(self, name):
        path = self.folder / name / "metrics.jsonl"
        return path.read_text() if path.exists() else ""

    def lines(self, name):
        return [json.loads(line) for line in self.text(name).splitlines()]

    def newest(self, name):
        """The step of the newest whole line."""
        whole = self.text(name).rpartition("\n")[0].splitlines()
        return json.loads(whole[-1])["step"] if whole else -1

    def saved(self, name):
        records = (self.folder / name / "checkpoints").glob("*/jaxgen.json")
        return max((int(path.parent.name) for path in records), default=0)

    def interrupt(self, name, after_step, delay_s, number):
        """Starts the run and sends it a signal some time after the line of a step."""
        # Lines of the life before are there until this one is under way.
        after_step = max(after_step, self.newest(name) + 1)
        process = self.start(name)
        try:
            while self.newest(name) < after_step and process.poll() is None:
                time.sleep(0.002)
            time.sleep(delay_s)
            process.send_signal(number)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, error, self.newest(name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def history(runs):
    """One run straight through, another killed three times, told to stop once, and finished.

    Returns what happened to the second: (exit code, stderr, newest line, newest save) a life.
    """
    chance = random.Random()
    straight = runs.start("straight")
    lives = []
    try:
        # In each part of the run, so that it is never over before it is killed.
        for number, first in ((9, 2), (9, 9), (9, 16), (15, 22)):
            after = first + chance.randrange(4)
            # A save takes some 0.1 s and a step some 0.01 s: in the middle of the one or the other.
            delay_s = chance.random() * 0.05
            happened = runs.interrupt("killed", after, delay_s, signal.Signals(number))
            lives.append((*happened, runs.saved("killed")))
        last = runs.start("killed")
        _, error = last.communicate(timeout=120)
        lives.append((last.returncode, error, runs.newest("killed"), runs.saved("killed")))
        _, error = straight.communicate(timeout=120)
        assert straight.returncode == 0, error
    finally:
        straight.kill()
    return lives


def test_killed_three_times_every_step_is_there_once_and_bit_for_bit(runs, history):
    assert [code for code, *_ in history[:3]] == [-signal.SIGKILL] * 3, history
    reached = [newest for _, _, newest, _ in history]
    assert 0 < reached[0] < reached[1] < reached[2] < STEPS, "it was not killed on its way"
    straight, killed = runs.lines("straight"), runs.lines("killed")
    assert [line["step"] for line in killed] == list(range(STEPS + 1))
    # JSON gives every float back bit for bit.
    same = ("step", "loss", "grad_norm", "learning_rate", "tokens", "skipped", "eval_loss")
    for mine, theirs in zip(killed, straight, strict=True):
        assert {key: mine.get(key) for key in same} == {key: theirs.get(key) for key in same}
    assert len({line["loss"] for line in straight[1:]}) == STEPS


def test_steps_since_the_newest_save_are_done_again_and_no_others(history):
    for _, error, newest, saved in history[:3]:
        assert "Traceback" not in error
        # The save of a step is complete before the next begins; one may be lost on its way.
        assert newest - 2 * SAVE_EVERY <= saved <= newest


def test_sigterm_saves_the_step_it_is_at_and_exits_0(runs, history):
    code, error, newest, saved = history[3]
    assert code == 0, error
    assert "jaxgen: SIGTERM: saving after this step, then stopping" in error
    assert 22 <= newest == saved < STEPS
    code, error, newest, saved = history[4]
    assert (code, newest, saved) == (0, STEPS, STEPS), error


def test_nothing_is_left_of_the_saves_that_were_killed(runs, history):
    folders = [path.name for path in (runs.folder / "killed" / "checkpoints").iterdir()]
    assert sorted(folders) == [f"{STEPS - SAVE_EVERY:08d}", f"{STEPS:08d}"]
