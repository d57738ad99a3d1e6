import json

import fsspec
import pytest
import tokenizers
from corpus import texts

from jaxgen.data.text_stream import TextStream
from jaxgen.data.tokenizer import EOS, Tokenizer, check_vocab
from jaxgen.errors import UserError

TEXT = "def f(x):\n\treturn 'é漢字😀' + \u00a0x  # \x00\r\n" + EOS + " \ufffd end"


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train(texts(200), 320)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return Tokenizer.from_bytes() if request.param == "bytes" else bpe


def test_bytes_are_bytes():
    tokenizer = Tokenizer.from_bytes()
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.vocab_size == 258
    assert sorted({tokenizer.bos_id, tokenizer.eos_id}) == [256, 257]


def test_text_comes_back(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.encode(EOS, special=True) == [tokenizer.eos_id]
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.decode([tokenizer.eos_id], special=True) == EOS


def test_training_is_repeatable_and_shortens(bpe):
    again = Tokenizer.train(texts(200), 320)
    assert again.fingerprint == bpe.fingerprint
    assert bpe.vocab_size == 320
    text = " ".join(texts(5))
    assert len(bpe.encode(text)) < 0.6 * len(text.encode())


def test_documents_equal_single_texts(tokenizer, monkeypatch):
    documents = [*texts(5), ""]
    encoded = tokenizer.encode_documents(documents)
    for document, ids in zip(documents, encoded, strict=True):
        assert ids.tolist() == [
            tokenizer.bos_id, *tokenizer.encode(document), tokenizer.eos_id
        ]  # fmt: skip
    # A long text is encoded in parts cut at line ends.
    monkeypatch.setattr("jaxgen.data.tokenizer._MAX_CHARS", 50)
    long = "\n".join(texts(5))
    assert tokenizer.decode(tokenizer.encode_documents([long])[0]) == long


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_save_and_load(tokenizer, tmp_path, where):
    folder = str(tmp_path / "a" / "b") if where == "folder" else f"memory://{tmp_path.name}"
    tokenizer.save(folder)
    for path in (folder, f"{folder}/tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (
            tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        )  # fmt: skip
    with fsspec.open(f"{folder}/tokenizer.json", "rt") as file:
        outside = tokenizers.Tokenizer.from_str(file.read())
    text = TEXT.replace(EOS, "")
    # It begins a text as we do.
    assert outside.encode(text).ids == tokenizer.encode_prompt(text)


def test_a_stream_shows_what_decode_shows(tokenizer):
    ids = [*tokenizer.encode(TEXT), tokenizer.eos_id, *tokenizer.encode("漢 字")]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids[:-1]]
    cut = "".join(pieces) + stream.flush()
    assert cut == tokenizer.decode(ids[:-1])
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in ids) + stream.flush() == tokenizer.decode(ids)


def test_a_stream_shows_special_tokens_that_it_is_told_to():
    tokenizer = Tokenizer.from_bytes()
    stream = TextStream(tokenizer, {tokenizer.eos_id: EOS})
    ids = [0xC3, tokenizer.eos_id, tokenizer.bos_id, *"漢 字".encode()]
    assert "".join(stream.push(token) for token in ids) + stream.flush() == f"\ufffd{EOS}漢 字"


def byte_fallback(folder):
    """As those of Llama 2, Mistral and Gemma: a token a byte where there is no other."""
    vocab = {"<unk>": 0, "▁": 1, "▁a": 2, "b": 3, "日": 4}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    model = tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(str(folder))


@pytest.mark.parametrize("text", ["日本語 😀😀 b", "😀😀😀 é b", " b  b", "本日本", "日 日"])
def test_runs_of_byte_tokens_are_streamed_as_they_are_decoded(tmp_path, text):
    tokenizer = byte_fallback(tmp_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids).strip() == text.strip()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    # Nothing waits for longer than the bytes of a character, and a space that is dropped.
    shown = "".join("x" if piece else "." for piece in pieces)
    assert max(map(len, shown.split("x"))) <= 4


def test_bytes_that_are_no_text_are_shown_soon():
    tokenizer, decoded = Tokenizer.from_bytes(), []
    decode, stream = tokenizer.decode, TextStream(tokenizer)
    tokenizer.decode = lambda ids: decoded.append(len(ids)) or decode(ids)
    wrong = [0xFF] * 50 + [0xC3] * 50 + [0xE6, 0x9C] * 25
    ids = [*b"ab", *wrong, *"本é".encode()]
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == decode(ids)
    assert len("".join(pieces[:100])) > 80
    assert pieces[-1] == "é"
    assert max(decoded) < 20


def test_no_half_character_is_shown():
    stream = TextStream(Tokenizer.from_bytes())
    assert [stream.push(byte) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert stream.push(0xC3) == ""
    assert stream.flush() == "\ufffd"


def outside_tokenizer(*special):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(list(special))
    return model


def test_special_tokens_of_a_published_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    outside_tokenizer("<s>", "</s>", "<eot>").save(str(path))
    found = Tokenizer.load(str(path))
    assert (found.bos_id, found.eos_id, found.pad_id) == (2, 3, 3)
    config = {"eos_token": {"content": "<eot>"}, "bos_token": None, "pad_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = Tokenizer.load(str(tmp_path))
    assert (named.bos_id, named.eos_id, named.pad_id) == (None, 4, 3)
    assert named.encode_prompt("a") == [0]
    assert found.encode_prompt("a") == [0]
    assert named.fingerprint != found.fingerprint


def save_outside(folder, config, *, post_processor=True):
    model = outside_tokenizer("<s>", "</s>")
    if post_processor:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(str(folder))


@pytest.mark.parametrize(
    ("post_processor", "add", "begin"),
    [
        (True, None, (2,)),
        (False, None, ()),
        (True, False, ()),
        (False, True, (2,)),
    ],
)
def test_what_begins_a_text_is_what_the_files_say(tmp_path, post_processor, add, begin):
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "?", "model_max_length": 9}
    config |= {} if add is None else {"add_bos_token": add}
    found = save_outside(tmp_path, config, post_processor=post_processor)
    assert found.begin == begin
    assert found.encode_prompt("a") == [*begin, 0]
    assert found.encode_documents(["a"])[0].tolist() == [*begin, 0, 3]
    found.save(str(tmp_path / "again"))
    again = Tokenizer.load(str(tmp_path / "again"))
    assert (again.begin, again.fingerprint) == (found.begin, found.fingerprint)
    # What other software reads there is kept.
    kept = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert kept == {
        **config, "pad_token": None, "add_bos_token": bool(begin),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip


def test_a_tokenizer_that_was_saved_before_still_begins_texts(tmp_path):
    # These four keys, and no post-processor, are what runs wrote when every text had a begin.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config |= {"eos_token": "</s>", "pad_token": None}
    assert save_outside(tmp_path, config, post_processor=False).encode_prompt("a") == [2, 0]


@pytest.mark.parametrize("place", ["config", "named", "jinja", "json"])
def test_the_chat_template_is_found_and_kept(tmp_path, place):
    config = {"eos_token": "</s>"}
    if place in ("config", "jinja"):
        config["chat_template"] = "other" if place == "jinja" else "{{ 1 }}\n"
    if place == "named":
        named = {"tool_use": "other", "default": "{{ 1 }}\n"}
        config["chat_template"] = [{"name": k, "template": v} for k, v in named.items()]
    if place == "jinja":
        (tmp_path / "chat_template.jinja").write_text("{{ 1 }}\n")
    if place == "json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 1 }}\n"}))
    found = save_outside(tmp_path, config)
    assert found.chat_template == "{{ 1 }}\n"
    found.save(str(tmp_path / "again"))
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ 1 }}\n"
    assert Tokenizer.load(str(tmp_path / "again")).chat_template == "{{ 1 }}\n"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("tokenizer_config.json", b"[]", r"tokenizer_config\.json holds a list, no object"),
        ("chat_template.json", b"3", r"chat_template\.json holds a int, no object"),
        ("chat_template.json", b'{"chat_template": {"a": 1}}', r"no text .*TypeError\('a dict'\)"),
        ("chat_template.json", b'{"chat_template": [{"x": 1}]}', r"no text .*KeyError\('name'\)"),
        ("chat_template.json", b'{"chat_template": [7]}', "chat_template is no text and no list"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja is not UTF-8"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [5]}', "is no table of tokens"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "is no table of tokens"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"9": {"content": "<eot>"}}}',
            r"has '<eot>' as 9 and it is 4 by tokenizer\.json",
        ),
    ],
)
def test_files_of_another_kind_are_one_line(tmp_path, name, content, line):
    outside_tokenizer("<s>", "</s>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line) as error:
        Tokenizer.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_tokens_that_the_config_alone_names_are_tokens(tmp_path):
    """As in transformers, whether the vocabulary has the id already or not."""
    added = {"3": "</s>", "4": "<eot>", "0": "a"}
    config = {
        "added_tokens_decoder": {n: {"content": c, "special": n == "4"} for n, c in added.items()}
    }
    found = save_outside(tmp_path, config)
    assert found.encode("a<eot>a", special=True) == [0, 4, 0]
    assert (found.vocab_size, 4 in found.special_ids, 0 in found.special_ids) == (5, True, False)
    found.save(str(tmp_path / "again"))
    again = Tokenizer.load(str(tmp_path / "again"))
    assert again.fingerprint == found.fingerprint
    assert again.encode("<eot>", special=True) == [4]


def test_offsets_point_at_the_characters_of_a_token(bpe):
    text = " é漢😀 end" + EOS
    ((ids, offsets),) = bpe.encode_with_offsets([text])
    assert ids.tolist() == bpe.encode(text, special=True)
    assert offsets[-1].tolist() == [len(text) - len(EOS), len(text)]
    assert offsets[0][0] == 0
    assert set(range(len(text))) == {n for start, end in offsets for n in range(start, end)}


def test_what_is_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(str(path))
    path.write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(str(path))
    (tmp_path / "c.py").write_text("config = 1")
    for other in (str(tmp_path / "c.py"), "/dev/null"):
        with pytest.raises(UserError, match=f"^{other} is not a tokenizer; give a tokenizer.json"):
            Tokenizer.load(other)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(str(path))
    outside_tokenizer("<x>").save(str(path))
    with pytest.raises(UserError, match="no end-of-text token"):
        Tokenizer.load(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<y>"}')
    with pytest.raises(UserError, match="has no token '<y>'"):
        Tokenizer.load(str(path))
    with pytest.raises(UserError, match="use at least 258"):
        Tokenizer.train(["a"], 200)


def test_the_vocabulary_must_fit_the_model(bpe):
    check_vocab(bpe, 320)
    with pytest.raises(UserError, match=r"320 tokens and model.vocab_size=319; set .* to 384"):
        check_vocab(bpe, 319)
