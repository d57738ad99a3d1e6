"""Files of prompts: the answers of `Engine.generate`, in order, in bounded memory; wrong lines."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from echo_engine import MAX_SEQ_LEN, EchoEngine
from echo_engine import tokenizer as echo_tokenizer
from formats.small_folders import write_folder
from serving import wait_for
from small_model import CONFIG, ONE, make, mesh_of

from jaxgen.cli import main
from jaxgen.data.chat import encode_prompt
from jaxgen.errors import UserError
from jaxgen.serve import offline
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.engine import Engine
from jaxgen.serve.offline import Lines, answer_lines, check_output
from jaxgen.serve.request import SamplingConfig

WORDS = echo_tokenizer()
GREEDY = SamplingConfig()
SIZES = {"vocab_size": 258, "max_seq_len": MAX_SEQ_LEN}


def write(path, records):
    lines = (each if isinstance(each, str) else json.dumps(each) for each in records)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def lines_of(path, sampling=GREEDY, **sizes):
    return Lines(str(path), WORDS, sampling, **(SIZES | sizes))


def test_answers_are_those_of_generate(tmp_path):
    chat = [{"role": "user", "content": "é?"}]
    records = [
        *({"prompt": f"prompt {i} " * (i % 4 + 1), "max_tokens": i % 9 + 1} for i in range(20)),
        {"prompt": [72, 73, 74], "temperature": 0.8, "seed": 77},
        {"messages": chat, "top_k": 3, "temperature": 1},
        {"prompt": "last", "temperature": 0, "logprobs": 2, "repetition_penalty": 1.3},
    ]
    source, config = write(tmp_path / "in.jsonl", [*records, " "]), {"vocab_size": 260}
    sampling = SamplingConfig(max_tokens=12, temperature=0.9, top_p=0.95, seed=5)
    model = dataclasses.replace(CONFIG, max_seq_len=64, **config)
    settings = EngineConfig(max_num_seqs=2, prefill_chunk=16, block_size=8, kv_blocks=60)
    with jax.set_mesh(mesh_of(ONE)), Engine(make(model), WORDS, settings) as engine:
        lines = lines_of(source, sampling, vocab_size=260, max_seq_len=64)
        assert lines.count() == len(records)
        output = str(tmp_path / "made" / "out.jsonl")
        answer_lines(engine, lines, output, total=len(records), stop_ids=[5])
        prompts = [
            encode_prompt(WORDS, chat)
            if "messages" in each
            else WORDS.encode_prompt(each["prompt"])
            if isinstance(each["prompt"], str)
            else each["prompt"]
            for each in records
        ]
        samplings = [
            dataclasses.replace(
                sampling,
                **{"seed": 5 + i}
                | {
                    k: float(v) if k == "temperature" else v
                    for k, v in each.items()
                    if k not in ("prompt", "messages")
                },
            )
            for i, each in enumerate(records)
        ]
        expected = engine.generate(prompts, samplings, stop_ids=[5])
        assert engine.stats().recompiles == 0
    got = read(output)
    assert [each["text"] for each in got] == [piece.text for piece in expected]
    for each, prompt, piece, asked in zip(got, prompts, expected, samplings, strict=True):
        assert each["prompt_tokens"] == len(prompt)
        assert each["completion_tokens"] == len(piece.tokens)
        full = len(piece.tokens) == asked.max_tokens
        assert each["finish_reason"] == ("length" if full else "stop")
    assert len({each["text"] for each in got}) > 15
    assert [i for i, each in enumerate(got) if "logprobs" in each] == [len(records) - 1]
    for each, token, scored in zip(
        got[-1]["logprobs"], expected[-1].tokens, expected[-1].logprobs, strict=True
    ):
        assert each["token"] == token
        # Sums of fp32 numbers of about 10 in batches of other sizes.
        assert each["logprob"] == pytest.approx(scored.logprob, abs=1e-5)
        assert [token for token, _ in each["top"]] == [token for token, _ in scored.top]
        assert len(each["top"]) == 2


def test_lines_are_read_as_they_are_needed_and_written_as_they_are_done(tmp_path, monkeypatch):
    output, number = tmp_path / "out.jsonl", 200
    source = write(tmp_path / "in.jsonl", [{"prompt": f"line {i}!"} for i in range(number)])
    unwritten, waits = [], []
    submit = offline._submit

    def seen(engine, line, *rest, **given):
        answer = submit(engine, line, *rest, **given)
        waits.append(answer is None)
        return answer

    def lines():
        for at, line in enumerate(lines_of(source)):
            unwritten.append(at - len(read(output)))
            yield line

    monkeypatch.setattr(offline, "_submit", seen)
    # The queue is shorter than what may be under way.
    with EchoEngine(WORDS, slots=3, queue=5) as engine:
        answer_lines(engine, lines(), str(output), total=number)
    assert [each["text"] for each in read(output)] == [f"line {i}!" for i in range(number)]
    # Those that are under way, and never more.
    assert max(unwritten) <= offline.LINES_AHEAD * 3
    assert sum(waits) > 0


def test_what_fails_leaves_what_is_done_and_cancels_the_rest(tmp_path):
    output = tmp_path / "out.jsonl"
    records = [{"prompt": "ab"}, {"prompt": "cd"}, {"prompt": "x" * 900}, {"prompt": "ef"}]
    lines = lines_of(write(tmp_path / "in.jsonl", records))
    with EchoEngine(WORDS, slots=1, blocks=20) as engine:
        with pytest.raises(UserError, match=r"in\.jsonl:3: the prompt has 900 tokens, which with"):
            answer_lines(engine, lines, str(output), total=4)
        wait_for(lambda: engine.idle)
    assert [each["text"] for each in read(output)] == ["ab", "cd"]


def test_a_line_may_say_more_than_how_tokens_are_drawn(tmp_path):
    output, prompt = str(tmp_path / "out.jsonl"), "one two three"
    records = [
        {"prompt": prompt, "id": "a", "stop": "two", "priority": 2},
        {"prompt": prompt, "id": 7, "stop": ["three", "tw"]},
        {"prompt": prompt, "logit_bias": {"5": 1, "6": -2.5}},
    ]
    lines = lines_of(write(tmp_path / "in.jsonl", records))
    assert lines.count() == 3
    assert [*lines][2].sampling.logit_bias == ((5, 1.0), (6, -2.5))
    with EchoEngine(WORDS) as engine:
        submit, asked = engine.submit, []
        engine.submit = lambda *a, **more: asked.append(more["priority"]) or submit(*a, **more)
        answer_lines(engine, lines, output, total=3)
    assert asked == [2, 0, 0]
    got = read(output)
    assert [each["text"] for each in got] == ["one ", "one ", prompt]
    assert [each.get("id") for each in got] == ["a", 7, None]
    assert "id" not in got[2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "in.jsonl:2 is not JSON (Expecting"),
        ("[1]", "in.jsonl:2 has list; give it either prompt or messages"),
        ({}, "in.jsonl:2 has nothing; give it either prompt or messages"),
        ({"promt": "x"}, "in.jsonl:2 has promt; give it either prompt or messages"),
        ({"prompt": "x", "messages": []}, "in.jsonl:2 has prompt, messages; give it either"),
        ({"prompt": "x", "top_n": 3}, "in.jsonl:2: no field 'top_n'; did you mean top_"),
        ({"prompt": "x", "top_k": "3"}, "in.jsonl:2: top_k='3': expected INT"),
        ({"prompt": "x", "temperature": -1}, "in.jsonl:2: temperature=-1.0; use 0 for greedy"),
        ({"prompt": "x", "max_tokens": 9999}, "in.jsonl:2: the prompt has 1 tokens, which with"),
        (
            {"prompt": "x", "logit_bias": [[258, 1]]},
            "in.jsonl:2: logit_bias has token 258 and model",
        ),
        ({"prompt": "x", "logit_bias": {"-1": 1}}, "in.jsonl:2: logit_bias.0.0='-1': expected INT"),
        ({"prompt": "x", "stop": [5]}, "in.jsonl:2: stop.0=5: expected STR"),
        ({"prompt": "x", "priority": 0.5}, "in.jsonl:2: priority=0.5: expected INT"),
        ({"prompt": "x", "id": []}, "in.jsonl:2: id=[]: expected STR|INT|none"),
        ({"prompt": ["x"]}, """in.jsonl:2: prompt is "['x']"; give a text or token ids"""),
        ({"prompt": None}, "in.jsonl:2: prompt is 'None'; give a text or token ids"),
        ({"prompt": [999]}, "in.jsonl:2: the prompt has token 999 and model.vocab_size=258"),
        ({"prompt": []}, "in.jsonl:2: the prompt has no tokens; give it at least one"),
        ({"prompt": "\ud800"}, "in.jsonl:2: prompt has half of a surrogate pair; correct it"),
        ({"messages": "hi"}, "in.jsonl:2: 'messages' is no list of messages but \"hi\""),
        (
            {"messages": [{"role": "user"}]},
            "in.jsonl:2: message 1 has no text as its content but null",
        ),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_done(tmp_path, line, said):
    source = write(tmp_path / "in.jsonl", [{"prompt": "fine"}, line])
    with pytest.raises(UserError) as error:
        lines_of(source).count()
    assert str(error.value).removeprefix(f"{tmp_path}/").startswith(said)


def test_every_sampling_field_may_be_a_lines_own(tmp_path):
    values = {
        "logit_bias": [[3, -1.5], [4, 2]],
        "logprobs": 2,
        "min_tokens": 3,
        "repetition_penalty": 1.5,
    }
    for field in dataclasses.fields(SamplingConfig):
        value = values.get(field.name, 1)
        source = write(tmp_path / "in.jsonl", [{"prompt": "x", field.name: value}])
        (line,) = lines_of(source)
        given = ((3, -1.5), (4, 2.0)) if field.name == "logit_bias" else value
        given = float(given) if isinstance(field.default, float) else given
        assert line.sampling == dataclasses.replace(SamplingConfig(), **{field.name: given})


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"in\.jsonl has no lines"):
        lines_of(write(tmp_path / "in.jsonl", ["", " "])).count()
    with pytest.raises(UserError, match=r"none\.jsonl does not exist; check the path"):
        lines_of(tmp_path / "none.jsonl").count()
    with pytest.raises(UserError, match=r"in\.jsonl exists; give --output another name"):
        check_output(str(tmp_path / "in.jsonl"))


def test_the_command_answers_a_file_at_any_location(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxgen.compiler.enable_compilation_cache", lambda: None)
    made = []

    def engine(model, tokenizer, config, draft, donate):
        assert donate
        assert draft is None
        made.append(config.max_num_seqs)
        return EchoEngine(tokenizer)

    # Which compiles nothing.
    monkeypatch.setattr("jaxgen.serve.engine.Engine", engine)
    write_folder(tmp_path / "model", generation={"eos_token_id": [257, 9]})
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "bc", "max_tokens": 3}])
    asked = ["generate", str(tmp_path / "model"), "--input", source, "--max-tokens", "5"]
    output = "memory://answers/out.jsonl"
    assert main([*asked, "--output", output]) == 0
    import fsspec

    with fsspec.open(output) as file:
        got = [json.loads(line) for line in file]
    assert [each["prompt_tokens"] for each in got] == [2, 3]
    assert [each["text"] for each in got] == ["a", "bc"]
    assert [each["completion_tokens"] for each in got] == [2, 3]
    assert [each["finish_reason"] for each in got] == ["stop", "length"]
    assert made == [2]
    assert capsys.readouterr().out == ""
    for extra, line in (
        (["--output", output], "memory://answers/out.jsonl exists; give --output another name"),
        ([], "--input and --output go together"),
        (["--output", "x.jsonl", "--chat"], "--input takes no --prompt and no --chat"),
    ):
        assert main([*asked, *extra]) == 2
        assert line in capsys.readouterr().err
