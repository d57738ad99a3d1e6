import dataclasses
import json
import re

import numpy as np
import pytest
from chat_templates import TURNS, encode_chat, tokenizer

from jaxgen.data import rows
from jaxgen.data.config import DataConfig
from jaxgen.data.dataset import prepare
from jaxgen.data.loader import Loader
from jaxgen.data.rows import Manifest, PackedRows
from jaxgen.data.show import pack, show
from jaxgen.data.sources import Source
from jaxgen.errors import UserError

SEQ_LEN = 160


def conversation(number, words=3):
    answer = " ".join(f"word{number}" for _ in range(words))
    return [
        {"role": "user", "content": f"Say {number} é😀"},
        {"role": "assistant", "content": f"{answer}."},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": f"{number}!"},
    ]


# Two that are longer than a row: of one nothing counts before its end.
LONG = [TURNS[0], {"role": "assistant", "content": "ha" * 200}]
LATE = [{"role": "user", "content": "why " * 60}, {"role": "assistant", "content": "so"}]
CONVERSATIONS = [*map(conversation, range(40)), LONG, LATE]


def write_jsonl(folder, conversations, name="a.jsonl", **fields):
    lines = [json.dumps({"messages": messages, **fields}) for messages in conversations]
    (folder / name).write_text("\n".join(lines) + "\n")
    return Source("chat", str(folder / name))


def config(tmp_path, source, template="mistral", **fields):
    folder = str(tmp_path / template)
    tokenizer(template).save(folder)
    fields = {"sources": (source,), "eval_fraction": 0.2, **fields}
    return DataConfig(tokenizer=folder, cache_dir=str(tmp_path / "cache"), **fields)


def segments(packed, split):
    found = PackedRows(packed.folders[0], packed.manifests[0], split)
    return [
        (seg["id"].tolist(), seg["counted"].tolist()) for n in range(len(found)) for seg in found[n]
    ]


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_conversations_and_what_counts_of_them(tmp_path, kind, capfd):
    source = write_jsonl(tmp_path, CONVERSATIONS)
    if kind == "parquet":
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        table = pyarrow.table({"messages": CONVERSATIONS})
        parquet.write_table(table, tmp_path / "a.parquet")
        source = Source("chat", f"{tmp_path}/*.parquet")
    packed = prepare(config(tmp_path, source), SEQ_LEN)
    (manifest,), found = packed.manifests, tokenizer("mistral")
    done, told = capfd.readouterr().err.splitlines()[-2:]
    assert done.startswith("data: packed ")
    assert told.startswith(f"data: at train.seq_len={SEQ_LEN}, 1 conversations of {tmp_path}")
    assert told.endswith(" are longer and end with it; left out 1 without an answer in it")
    expected = {}
    for messages in CONVERSATIONS[:-1]:
        ids, counted = encode_chat(found, messages)
        expected[tuple(ids[:SEQ_LEN].tolist())] = counted[:SEQ_LEN].tolist()
    train, held_out = segments(packed, "train"), segments(packed, "eval")
    assert {tuple(ids): counted for ids, counted in train + held_out} == expected
    assert len(train) + len(held_out) == len(expected)
    assert 2 <= len(held_out) <= 20
    assert (manifest.documents, manifest.cut, manifest.unanswered) == (41, 1, 1)
    assert manifest.format == rows.MASKED_FORMAT
    for info, its in ((manifest.train, train), (manifest.eval, held_out)):
        assert info.tokens == sum(len(ids) for ids, _ in its)
        assert info.targets == sum(sum(counted) for _, counted in its)
        said = [np.asarray(ids)[np.asarray(counted)] for ids, counted in its]
        assert info.text_bytes == sum(len(found.decode(x, special=True).encode()) for x in said)
    text = pack(packed.config, SEQ_LEN)
    assert "1 longer than a row, which end with it; left out 1 without an answer in it" in text
    assert f"{manifest.train.targets:,} of them count" in text


def test_targets_count_where_the_assistant_says_them(tmp_path):
    packed = prepare(config(tmp_path, write_jsonl(tmp_path, CONVERSATIONS)), SEQ_LEN)
    loader = Loader(packed, 4)
    batch = loader.host_batch(0)
    found = packed.tokenizer
    seen = 0
    for row in range(4):
        for segment in range(1, batch.segments[row].max() + 1):
            own = batch.segments[row] == segment
            weights, targets = batch.weights[row, own], batch.targets[row, own]
            said = found.decode(targets[weights > 0], special=True)
            text = found.decode(batch.tokens[row, own], special=True)
            assert said == "".join(re.findall(r"\[/INST\](.*?(?:</s>|$))", text))
            seen += bool(said)
            assert set(weights.tolist()) <= {0, 1}
            assert weights[-1] == 0
    assert seen > 4
    assert batch.weights[batch.segments == 0].sum() == 0
    held_out = list(loader.held_out(2))
    assert all(float(np.asarray(batch.weights).sum()) > 0 for batch in held_out)


def test_what_counts_is_marked_when_it_is_shown(tmp_path):
    text = show(config(tmp_path, write_jsonl(tmp_path, CONVERSATIONS)), SEQ_LEN, 4, 1)
    number = re.search(r"Say (\d+)", text)[1]
    answer = f"⟦ word{number} word{number} word{number}.</s>⟧"
    assert f"<s>[INST] Say {number} é😀 [/INST]{answer}[INST] Again [/INST]⟦ {number}!</s>⟧" in text


def test_the_template_and_the_field_belong_to_the_pack(tmp_path):
    source = write_jsonl(tmp_path, CONVERSATIONS[:9])
    given = config(tmp_path, source, eval_fraction=0.0)
    first = prepare(given, SEQ_LEN)
    assert prepare(given, SEQ_LEN).folders == first.folders
    other = prepare(config(tmp_path, source, "smollm2", eval_fraction=0.0), SEQ_LEN)
    assert other.folders != first.folders
    assert other.fingerprint != first.fingerprint
    # A pack is a source itself, and its template is beside it.
    again = dataclasses.replace(
        given,
        sources=(Source("packed", str(first.folders[0])),),
        tokenizer=str(first.folders[0]),
    )
    batches = [Loader(prepare(c, SEQ_LEN), 2).host_batch(1) for c in (given, again)]
    np.testing.assert_array_equal(batches[0].weights, batches[1].weights)
    assert Manifest.read(first.folders[0]).train.targets == first.manifests[0].train.targets


def test_text_and_conversations_mix(tmp_path):
    (tmp_path / "plain.txt").write_text("plain text " * 300)
    sources = (
        write_jsonl(tmp_path, CONVERSATIONS),
        Source("text", str(tmp_path / "plain.txt")),
    )
    batch = Loader(
        prepare(config(tmp_path, None, sources=sources, eval_fraction=0.0), SEQ_LEN), 8
    ).host_batch(0)
    text = ["plain" in tokenizer("mistral").decode(row) for row in batch.tokens]
    assert 0 < sum(text) < 8
    for row, plain in enumerate(text):
        whole = batch.weights[row].sum() == SEQ_LEN - batch.segments[row].max()
        assert whole == plain


def test_tools_are_told_to_the_template(tmp_path):
    tools = [{"function": {"name": "add"}}]
    source = write_jsonl(tmp_path, CONVERSATIONS[:4], tools=tools)
    packed = prepare(config(tmp_path, source, "qwen2.5", eval_fraction=0.0), 512)
    ids, _ = segments(packed, "train")[0]
    assert '<tools>\n{"function": {"name": "add"}}\n</tools>' in packed.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": []}', "'messages' is no list of messages but []"),
        ('{"messages": "hello"}', "'messages' is no list of messages but \"hello\""),
        ('{"messages": ["hello"]}', "message 1 of 'messages' is no object but \"hello\""),
        ('{"messages": [{"content": "x"}]}', 'message 1 has no role but {"content": "x"}'),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "message 1 has no text as its content but",
        ),
        ('{"messages": [{"role": "user"}]}', "message 1 has no text as its content but null"),
        ('{"messages": [{"role": "user", "content": ""}], "tools": "x"}', "'tools' is no list"),
        ('{"text": "x"}', "has no field 'messages' but text; set the source's text_field"),
        ("{", "is not JSON"),
        (
            '{"messages": [{"role": "system", "content": "x"}]}',
            "the chat template fails: Only user and assistant roles are supported!",
        ),
    ],
)
def test_a_malformed_record_is_named(tmp_path, line, says):
    source = write_jsonl(tmp_path, CONVERSATIONS[:2])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(UserError, match=re.escape(says)) as error:
        prepare(config(tmp_path, source), SEQ_LEN)
    assert str(error.value).startswith(f"{tmp_path}/a.jsonl:4")
    assert "\n" not in str(error.value)


def test_what_is_not_utf8_is_left_out(tmp_path):
    source = write_jsonl(tmp_path, CONVERSATIONS[:3])
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n\xff\n')
    (manifest,) = prepare(config(tmp_path, source, eval_fraction=0.0), SEQ_LEN).manifests
    assert (manifest.documents, manifest.undecodable) == (3, 2)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_tokenizer_without_template_is_refused_at_once(tmp_path, name):
    source = write_jsonl(tmp_path, CONVERSATIONS[:3])
    given = dataclasses.replace(config(tmp_path, source), tokenizer=name)
    with pytest.raises(UserError, match="has no chat template"):
        prepare(given, SEQ_LEN)
    assert not (tmp_path / "cache").exists()


def test_nothing_to_learn_is_an_error(tmp_path):
    with pytest.raises(
        UserError, match="nothing to learn: 1 files.* 2 without .* raise train.seq_len"
    ):
        prepare(config(tmp_path, write_jsonl(tmp_path, [LATE, TURNS[:1]])), SEQ_LEN)
