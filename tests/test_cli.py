import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from formats.small_folders import write_folder

from jaxgen.cli import main
from jaxgen.commands import COMMANDS
from jaxgen.serve.request import SamplingConfig

ROOT = Path(__file__).parent.parent
ENVIRON = os.environ | {"PYTHONPATH": str(ROOT)}
TINY = str(ROOT / "configs" / "tiny.py")


@pytest.fixture(autouse=True)
def _own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The command would move the suite's cache of compiled programs.
    monkeypatch.setattr("jaxgen.compiler.enable_compilation_cache", lambda: None)


def refused(capsys, *argv):
    """Runs a command that must fail for a reason of the user's; returns its one line."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("jaxgen: ")
    assert not err.startswith("jaxgen: jaxgen")
    assert list(Path.cwd().iterdir()) == []
    return err.removeprefix("jaxgen: ").rstrip("\n")


def run_python(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=ENVIRON)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "no command 'trian'; did you mean train?"),
        (["frobnicate"], "no command 'frobnicate'; see jaxgen --help"),
        (["serve", "runs/tiny"], "runs/tiny is no model"),
        (["data"], "data takes pack or show"),
        (["bench", "srve"], "bench takes train or collectives or serve, not 'srve'"),
        (["bench", "serve"], "bench serve needs one of MODEL, to serve it, and --url of a"),
        (["train"], "train needs CONFIG.py[:name]: a Python file"),
        (["train", "nope.py"], "no config file nope.py"),
        (["train", TINY, "--train.stesp", "3"], "no field --train.stesp; did you mean --train.st"),
        (["train", TINY, "--steps", "3"], "no field --steps; did you mean --train.steps?"),
        (["train", TINY, "--run_dir", "x"], "no option --run_dir; did you mean --run-dir?"),
        (["train", TINY, "--train.steps", "many"], "--train.steps many: expected INT"),
        (["train", TINY, "--train.steps"], "--train.steps needs a value"),
        (["train", TINY, "--train.steps", "--mesh.fsdp"], "--train.steps needs a value"),
        (["train", TINY, "extra"], "unrecognized arguments: extra; see jaxgen train --help"),
        (["train", TINY, "--devices", "x"], "argument --devices: invalid int value: 'x'"),
        (["train", TINY, "--devices", "0"], "--devices 0; use a positive number of devices"),
        (["generate", "x", "--prompt", "-- a"], "; for a value of --prompt: --prompt='-- a'"),
        (["generate", "x", "--prompt", "-- a", "b"], "; for a value of --prompt: --prompt='-- a'"),
        (["generate", "x", "--prompt", "--a", "--chat"], "for a value of --prompt: --prompt='--a'"),
        (
            ["generate", "x", "--prompt", "-x"],
            "if its value begins with a dash: --prompt=VALUE; see",
        ),
        (["doctor", "--mesh.fsdp", "4"], "no field --mesh.fsdp"),
        (["bench", "collectives", "--mesh.dta", "4"], "no field --mesh.dta; did you mean --mesh.d"),
        (["bench", "collectives", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["generate", "runs/none", "--prompt", "x"], "runs/none is no model; give a run directory"),
        (["convert"], "convert takes from-gguf or to-hf"),
        (["convert", "to-hf"], "convert to-hf needs MODEL: a run directory such as"),
        (["convert", "to-hf", "runs/none"], "convert to-hf needs DIR: the folder to write"),
        (["convert", "to-hf", "runs/none", "out"], "runs/none is no model"),
        (["convert", "to-hf", "x", "y", "z"], "unrecognized arguments: z"),
        (["convert", "to-hf", "x", "y", "--dtype", "int8"], "argument --dtype: invalid choice"),
        (
            ["train", TINY, "--mesh.fsdp", "3"],
            "needs 12 devices and there are 8; use mesh.data=2 mesh.fsdp=2 mesh.tensor=2, or --dev",
        ),
        (["train", TINY, "--mesh.tensor", "4", "--mesh.data", "1"], "num_kv_heads=2 is not divisi"),
        (
            ["train", TINY, "--model.norms", "none"],
            "--model.norms none: expected pre|post|pre_post",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_overview_lists_every_command_and_no_other(capsys):
    assert main(["--help"]) == 0
    listed = re.findall(r"^  jaxgen ([a-z -]+) [A-Z[]", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(COMMANDS)


def test_help_of_a_config_shows_every_field_with_its_unit_and_value(capsys):
    assert main(["train", TINY, "--train.steps", "12345", "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"--train.steps INT from 1 on\n +[^\[]{10,}\[12345\]", out)
    assert "--run-dir DIR" in out
    assert "--model.rope_scaling.factor FLOAT" in out
    assert "[none; set a field" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(capsys, command):
    assert main([*command.split(), "--help"]) == 0
    assert COMMANDS[command].summary in capsys.readouterr().out


def test_train_gets_the_config_and_the_run_directory(monkeypatch):
    import jaxgen.train.loop

    seen = []

    def train(config, run_dir):
        seen.append((config, run_dir))

    monkeypatch.setattr(jaxgen.train.loop, "train", train)
    argv = ["train", "--train.steps=3", TINY, "--mesh.fsdp", "-1", "--name", "mine"]
    assert main(argv) == 0
    assert main([*argv, "--run-dir", "there"]) == 0
    (config, run_dir), (_, second_dir) = seen
    assert (config.train.steps, config.mesh.fsdp, config.name) == (3, -1, "mine")
    assert (run_dir, second_dir) == ("runs/mine", "there")


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    import jaxgen.train.loop

    def train(config, run_dir):
        raise ZeroDivisionError

    monkeypatch.setattr(jaxgen.train.loop, "train", train)
    with pytest.raises(ZeroDivisionError):
        main(["train", TINY])


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/x"), OSError(28, "")])
def test_the_machine_refusing_is_the_users(monkeypatch, capsys, error):
    import jaxgen.train.loop

    def train(config, run_dir):
        raise error

    monkeypatch.setattr(jaxgen.train.loop, "train", train)
    assert "choose another place" in refused(capsys, "train", TINY)


@pytest.mark.smoke
def test_a_real_process_says_one_line_and_exits_with_2(tmp_path):
    done = run_python("-m", "jaxgen", "train", TINY, "--devices", "6")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "jaxgen: mesh data=2 x fsdp=2 x tensor=2 needs 8 devices and there are 6; "
        "use mesh.data=3 mesh.fsdp=1 mesh.tensor=2, or --devices 8 to simulate it\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_value_in_a_config_file_is_one_line(tmp_path):
    wrong = [
        ("train=LoopConfig(steps", "train=LoopConfig(stepz", "got an unexpected keyword argument"),
        ("num_layers=4", "num_layers='4'", "model.num_layers='4': expected INT"),
        ("num_kv_heads=2", "num_kv_heads='2'", "2.py:23: TypeError: unsupported operand"),
        ("num_kv_heads=2", "num_kv_heads=3", "model.num_heads=4 is not a multiple of model.num_kv"),
    ]
    for i, (old, new, _) in enumerate(wrong):
        (tmp_path / f"{i}.py").write_text(Path(TINY).read_text().replace(old, new))
    # In a process of its own: here the tests' type checker would be faster than the config's.
    code = "from jaxgen.cli import main; print([main(['train', f'{i}.py']) for i in range(4)])"
    done = run_python("-c", code)
    assert done.stdout == "[2, 2, 2, 2]\n"
    lines = done.stderr.splitlines()
    assert len(lines) == len(wrong)
    for line, (_, _, message) in zip(lines, wrong, strict=True):
        assert message in line


def test_ctrl_c_is_one_line_and_exits_with_130(tmp_path):
    (tmp_path / "slow.py").write_text("print('here', flush=True)\nimport time\ntime.sleep(60)")
    # A shell starts what runs behind it (`make test &`) with SIGINT ignored.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)"
    command = f"{heed}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", command, "-m", "jaxgen", "train", "slow.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=ENVIRON) as process:
        try:
            assert process.stdout.readline() == "here\n"
            start = time.perf_counter()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "jaxgen: interrupted\n")
    assert time.perf_counter() - start < 10


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m jaxgen train {TINY} --help"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -n 1"],
        capture_output=True,
        text=True,
        env=ENVIRON,
    )
    assert done.stderr == ""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder, whose makers draw."""
    folder = tmp_path_factory.mktemp("model")
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [7, 257]}
    said["repetition_penalty"] = 1.1
    write_folder(folder, generation=said)
    return str(folder)


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ((), {}),
        (("--temperature", "0"), {"temperature": 0.0}),
        (("--top-k", "5", "--top-p", "1"), {"top_k": 5, "top_p": 1.0}),
        (
            ("--min-p", "0.1", "--repetition-penalty", "1"),
            {"min_p": 0.1, "repetition_penalty": 1.0},
        ),
        (
            ("--presence-penalty=-1", "--frequency-penalty", "2", "--min-tokens", "4"),
            {"presence_penalty": -1.0, "frequency_penalty": 2.0, "min_tokens": 4},
        ),
    ],
)
def test_generate_draws_as_the_model_says_unless_it_is_told(
    monkeypatch, capsys, model, argv, changes
):
    def generate_text(model, tokenizer, prompts, samplings, stop_ids, *, chat, draft, donate):
        assert (set(stop_ids), tokenizer.eos_id) == ({7, 257}, 257)
        assert not chat
        assert draft is None
        assert donate
        said = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1} | changes
        assert samplings == [SamplingConfig(seed=seed, **said) for seed in (4, 5)]
        return [prompt.upper() for prompt in prompts]

    monkeypatch.setattr("jaxgen.serve.generate.generate_text", generate_text)
    assert main(["generate", model, "--seed", "4", "--prompt", "ab", "cd", *argv]) == 0
    assert capsys.readouterr().out == "abAB\ncdCD\n"


def test_generate_takes_a_folder_on_a_mesh(capsys, model):
    argv = ["generate", model, "--prompt", "hello", "--max-tokens", "8", "--mesh.tensor", "2"]
    argv += ["--mesh.context", "2"]
    assert main(argv) == 0
    drawn = capsys.readouterr().out
    assert drawn.startswith("hello")
    assert main([*argv, "--temperature", "0"]) == 0
    assert capsys.readouterr().out != drawn


@pytest.mark.full
def test_a_draft_model_changes_no_answer(capsys, model, monkeypatch):
    # Drafts of a model as large as the other would otherwise never be tried.
    monkeypatch.setattr("jaxgen.serve.speculate.drafting_cost", lambda *_: 0.0)
    argv = ["generate", model, "--prompt", "hello", "--max-tokens", "8"]
    argv += ["--repetition-penalty", "1"]
    assert main(argv) == 0
    drawn = capsys.readouterr().out
    assert main([*argv, "--draft", model]) == 0
    assert capsys.readouterr().out == drawn


def test_a_draft_model_is_read_and_given_on(capsys, model, monkeypatch):
    given = []

    def generate_text(model, tokenizer, prompts, samplings, stop_ids, *, chat, draft, donate):
        assert donate
        given.append((model, draft))
        return ["" for _ in prompts]

    monkeypatch.setattr("jaxgen.serve.generate.generate_text", generate_text)
    argv = ["generate", model, "--prompt", "hello"]
    assert main([*argv, "--draft", model]) == 0
    ((large, draft),) = given
    assert draft is not large
    for mine, theirs in zip(jax.tree.leaves(draft), jax.tree.leaves(large), strict=True):
        assert np.array_equal(mine, theirs)
    capsys.readouterr()
    assert main([*argv, "--draft", "nowhere"]) == 2
    assert "nowhere is no model" in capsys.readouterr().err
    monkeypatch.setattr("jaxgen.serve.server.serve", lambda name, start, **_: start())
    argv = ["serve", model, "--port", "0", "--draft", model, "--engine.speculation", "off"]
    assert main(argv) == 2
    assert "speculation='off' and a draft model; use 'draft'" in capsys.readouterr().err


def test_convert_writes_a_folder_and_no_second_time(capsys, model, tmp_path):
    argv = ["convert", "to-hf", model, str(tmp_path / "out")]
    assert main([*argv, "--dtype", "bfloat16", "--mesh.tensor", "2"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert main(argv) == 2
    assert f"{tmp_path}/out is not empty; give a new folder" in capsys.readouterr().err


def test_help_of_a_model_shows_how_it_can_be_run(capsys, model):
    assert main(["generate", model, "--compute.attention", "xla", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: as the model's generation_config.json says, else 0.0)" in out
    assert "--mesh.tensor INT" in out
    assert "[xla]" in out
    assert "--train.steps" not in out
