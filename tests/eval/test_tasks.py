"""Measures by hand on a model of known probabilities; records, and what is wrong with them."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from small_models import CONFIG, make, mesh_of

from jaxgen.cli import main
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.eval.score import Score, Scorer
from jaxgen.eval.tasks import Question, Text, evaluate, read_records, table
from jaxgen.formats.families import family_for
from jaxgen.formats.folder import write_folder

TOKENIZER = Tokenizer.from_bytes()
# Nats of some bytes, whatever stands before them; "é" is the last two.
NATS = {" ": 2.0, "a": 2.5, "b": 4.0, "\xc3": 2.0, "\xa9": 2.0}
# After a space: "b" has 6 nats, "aaaa" 12, "éé" 10. Of these "b" is the likeliest; a character of
# "aaaa" is (3, not 5 or 6), and a byte of "éé" (2.5, not 3 or 6).
CHOICES = ["b", "aaaa", "éé"]


@pytest.fixture(scope="module")
def scorer():
    """Of a model whose next token never depends on those before: layers add nothing."""
    config = {"vocab_size": 258, "num_layers": 1, "layer_pattern": ("global",)}
    config |= {"logit_soft_cap": None, "sliding_window": None, "max_seq_len": 16}
    with jax.set_mesh(mesh_of()):
        model = make(type(CONFIG)(**(vars(CONFIG) | config)), scale=0.0)
        logprobs = np.full(258, math.log1p(-sum(math.exp(-n) for n in NATS.values())))
        logprobs -= math.log(258 - len(NATS))
        for char, nats in NATS.items():
            logprobs[ord(char)] = -nats
        model.embedding[...] = model.embedding[...] + 1.0
        model.norm.scale[...] = model.norm.scale[...] + 1.0
        # Hidden states are ones, up to the norm's epsilon.
        head = np.broadcast_to(logprobs[:, None] / 16, (258, 16)).astype(np.float32)
        model.head[...] = jax.device_put(head)
        yield Scorer(model)


def test_accuracies_are_what_one_counts_by_hand(scorer):
    questions = [Question("ab", tuple(CHOICES), answer) for answer in (0, 0, 0, 1, 1, 2)]
    results = evaluate(scorer, TOKENIZER, questions)
    assert results["questions"] == 6
    for name, right in (("acc", 3 / 6), ("acc_norm", 2 / 6), ("acc_bytes", 1 / 6)):
        assert results[name] == pytest.approx(right), name
        assert results[f"{name}_stderr"] == pytest.approx(math.sqrt(right * (1 - right) / 5))
    assert results["truncated"] == 0
    shown = table(results)
    assert "acc_norm   0.3333  0.2108" in shown.splitlines()[3]
    long = evaluate(scorer, TOKENIZER, [Question("a" * 14, ("b", " aaa", "a a"), 0)])
    assert (long["truncated"], long["acc"], long["acc_stderr"]) == (2, 1.0, None)
    assert table(long).splitlines()[2].split() == ["acc", "1.0000", "-"]


def test_a_space_joins_what_brings_none(scorer):
    class Heard(Scorer):
        def __init__(self):
            self.model = scorer.model

        def __call__(self, requests):
            self.texts = ["".join(map(TOKENIZER.decode, request)) for request in requests]
            return [Score(0.0, False)] * len(requests)

    heard = Heard()
    pairs = [("a", "b"), ("a ", "b"), ("a", " b"), ("a\n", "b"), ("", "b")]
    evaluate(heard, TOKENIZER, [Question(context, (b, "x"), 0) for context, b in pairs])
    assert heard.texts[::2] == ["a b", "a b", "a b", "a\nb", " b"]


def test_perplexities_are_what_one_computes_by_hand(scorer):
    texts = [Text("aab a"), Text("é"), Text("b" * 20 + " a")]
    nats = (3 * 2.5 + 4 + 2) + 4 + (20 * 4 + 2 + 2.5)
    results = evaluate(scorer, TOKENIZER, texts)
    expected = {
        "texts": 3,
        "tokens": 5 + 2 + 22,
        "loss": nats / 29,
        "word_perplexity": math.exp(nats / 5),
        "byte_perplexity": math.exp(nats / 29),
        "bits_per_byte": nats / 29 / math.log(2),
    }
    assert results == pytest.approx(expected, rel=1e-4)
    no_words = evaluate(scorer, TOKENIZER, [Text("b" * 400)])
    assert no_words["word_perplexity"] is None
    assert json.loads(json.dumps(no_words))["bits_per_byte"] == pytest.approx(4 / math.log(2), 1e-4)


def write(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    "record",
    [
        {"context": "c", "choices": ["x", "y", "z"], "answer": 1},
        {"question": "c", "choices": ["x", "y", "z"], "label": "1"},
        {"query": "c", "choices": ["x", "y", "z"], "gold": "B", "more": 7},
        {"ctx": "c", "choices": ["x", "y", "z"], "answer": "y", "text": "?"},
    ],
)
def test_questions_are_read_however_they_are_said(tmp_path, record):
    url = write(tmp_path / "q.jsonl", record, "", record)
    assert read_records(url) == [Question("c", ("x", "y", "z"), 1)] * 2
    assert len(read_records(url, 1)) == 1


def test_texts_are_read_from_any_location(tmp_path):
    import fsspec

    line = b'{"text": "a \xe2\x80\xa8 b"}\n'
    with fsspec.open("memory://texts.jsonl", "wb") as file:
        file.write(line * 2)
    assert read_records("memory://texts.jsonl") == [Text("a \u2028 b")] * 2


ASKED = {"context": "c", "choices": ["x", "y"], "answer": 0}


@pytest.mark.parametrize(
    ("records", "line"),
    [
        (['{"text": "a"', {"text": "b"}], ":1 is not JSON"),
        ([{"text": "a"}, 7], ":2 has neither 'choices' nor 'text' but int"),
        ([{"text": "a"}, {"txt": "b"}], ":2 has neither 'choices' nor 'text' but txt"),
        ([{"text": "a"}, "", ASKED], ":3 is a question and the first record a text"),
        ([ASKED, {"text": "a"}], ":2 is a text and the first record a question"),
        ([{"text": ""}], ":1: text is ''"),
        ([{"text": ["a"]}], ":1: text is ['a']"),
        (['{"text": "\\ud800"}'], ":1: text holds half of a surrogate pair"),
        ([ASKED, ASKED | {"choices": ["x"]}], ":2: choices=['x']; give a list of at least two"),
        ([ASKED | {"choices": ["x", 7]}], ":1: a choice is 7"),
        ([ASKED | {"choices": ["x", ""]}], ":1: a choice is ''"),
        ([ASKED | {"ctx": "d"}], ":1 has context and ctx; give one of them"),
        ([{"choices": ["x", "y"], "answer": 0}], ":1 has none of context, question, query, ctx"),
        ([{"context": "c", "choices": ["x", "y"]}], ":1 has none of answer, label, gold"),
        ([ASKED | {"context": None}], ":1: the context is None"),
        ([ASKED | {"answer": 2}], ":1: answer 2 is none of the 2 choices; give its index from 0"),
        ([ASKED | {"answer": -1}], ":1: answer -1 is none"),
        ([ASKED | {"answer": True}], ":1: answer True is none"),
        ([ASKED | {"answer": "C"}], ":1: answer 'C' is none"),
        ([ASKED | {"answer": "z"}], ":1: answer 'z' is none"),
        ([ASKED | {"choices": ["B", "A"], "answer": "A"}], ":1: answer 'A' can mean several"),
        ([ASKED | {"choices": ["x", "x"], "answer": "x"}], ":1: answer 'x' can mean several"),
        ([ASKED | {"choices": ["1", "0"], "answer": "1"}], ":1: answer '1' can mean several"),
        ([""], " has no records"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, records, line):
    url = write(tmp_path / "x.jsonl", *records)
    with pytest.raises(UserError) as error:
        read_records(url)
    assert f"{url}{line}" in str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    config = {"vocab_size": 264, "sliding_window": None, "layer_pattern": ("global",)}
    config |= {"logit_soft_cap": None, "max_seq_len": 64}
    with jax.set_mesh(mesh_of()):
        model = make(type(CONFIG)(**(vars(CONFIG) | config)))
        family, given = family_for(model.config)
        location = str(folder / "hf")
        write_folder(location, family, given, model, dtype="float32", tokenizer=TOKENIZER)
    yield location
    shutil.rmtree(location)


@pytest.mark.full
def test_the_command_gives_the_same_on_any_mesh(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxgen.compiler.enable_compilation_cache", lambda: None)
    rng = np.random.default_rng(0)
    words = ["def", "return", "self", "é", "for", "in", "open", "import"]

    def text(num):
        return " ".join(rng.choice(words, num))

    records = [
        {"question": text(3), "choices": [text(2), text(4), text(1)], "answer": int(answer)}
        for answer in rng.integers(0, 3, 20)
    ]
    data = write(tmp_path / "q.jsonl", *records)
    argv = ["eval", folder, "--data", data, "--limit", "12"]
    assert main([*argv, "--json", "--mesh.fsdp", "8"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["questions"] == 12
    assert main([*argv, "--mesh.tensor", "2", "--mesh.context", "2", "--batch-size", "3"]) == 0
    out = capsys.readouterr().out
    assert out == table(first) + "\n"
    texts = write(tmp_path / "t.jsonl", *({"text": text(n)} for n in (1, 5, 40)))
    argv = ["eval", folder, "--data", texts, "--json", "--compute.dtype"]
    losses = {}
    for dtype in ("float32", "bfloat16"):
        assert main([*argv, dtype]) == 0
        losses[dtype] = json.loads(capsys.readouterr().out)["loss"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_mistakes_are_one_line_before_a_model_is_read(folder, tmp_path, capsys):
    for argv, line in [
        ([], "no data; give --data FILE.jsonl"),
        (["--data", str(tmp_path / "no.jsonl")], "no.jsonl does not exist"),
        (["--data", write(tmp_path / "q.jsonl", ASKED), "--limit", "0"], "limit=0"),
    ]:
        assert main(["eval", folder, *argv]) == 2
        assert line in capsys.readouterr().err
