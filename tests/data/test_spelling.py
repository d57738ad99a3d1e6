"""How single tokens are shown, in every kind of vocabulary."""

import pytest
import vocabularies

from jaxgen.data.spelling import Spelling
from jaxgen.data.tokenizer import BOS, Tokenizer
from jaxgen.serve.logprobs import PlacedTokens
from jaxgen.serve.request import TokenLogprobs


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_tokens_stand_where_their_text_is(kind, tmp_path):
    tokenizer = vocabularies.KINDS[kind](tmp_path)
    ids = tokenizer.encode(vocabularies.TEXT)
    text, spelling = tokenizer.decode(ids), Spelling(tokenizer)
    placed = PlacedTokens(spelling)
    placed.push(ids, [TokenLogprobs(0.0, ())] * len(ids))
    found = placed.shown(None)
    spelled = [spelling.of(each.token, first=each.first) for each in found]
    assert b"".join(spelled).decode() == text
    before = b""
    for each, piece in zip(found, spelled, strict=True):
        # Its bytes, from the character that they are of.
        assert text[: each.place] == before.decode(errors="ignore")
        before += piece
        name = spelling.name(each.token, first=each.first)
        assert text[each.place :].startswith(name) or name.startswith("\\x")
    assert len({each.place for each in found}) > 20


def test_names():
    tokenizer = Tokenizer.from_bytes()
    spelling = Spelling(tokenizer)
    assert (spelling.of(97), spelling.name(97)) == (b"a", "a")
    assert (spelling.of(255), spelling.name(255)) == (b"\xff", r"\xff")
    assert spelling.name(0xE2, broken="bytes:") == r"bytes:\xe2"
    begin = tokenizer.encode(BOS, special=True)[0]
    assert (spelling.of(begin), spelling.name(begin)) == (None, BOS)
    # A row of the model that stands for nothing.
    assert (spelling.of(300), spelling.name(300)) == (None, "token_id:300")
    # A space that a tokenizer puts before a text is no part of it.
    words = vocabularies.unigram()
    token = words.names().index("▁null")
    spelling = Spelling(words)
    assert (spelling.name(token), spelling.name(token, first=True)) == (" null", "null")
