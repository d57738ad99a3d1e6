import random

import pytest
import tokenizers
import vocabularies

from jaxgen.data.token_bytes import at_start, token_bytes
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError


@pytest.fixture(params=vocabularies.KINDS)
def tokenizer(request, tmp_path):
    return vocabularies.KINDS[request.param](tmp_path)


def text_of(ids, spelled, first):
    spellings = [first.get(ids[0], spelled[ids[0]]), *(spelled[n] for n in ids[1:])] if ids else []
    return b"".join(spellings)


def test_bytes_are_what_decode_shows(tokenizer):
    spelled, rng = token_bytes(tokenizer), random.Random(0)
    first = at_start(tokenizer, spelled)
    ordinary = [n for n, spelling in enumerate(spelled) if spelling]
    assert set(range(tokenizer.vocab_size)) - set(ordinary) >= tokenizer.special_ids
    # All bytes but the one that UTF-8 never has.
    assert {spelling[0] for spelling in spelled if len(spelling) == 1} >= set(range(128))
    assert len(ordinary) >= tokenizer.vocab_size - len(tokenizer.special_ids) - 1
    ids = tokenizer.encode(vocabularies.TEXT)
    text = text_of(ids, spelled, first).decode()
    assert text == tokenizer.decode(ids)
    # Metaspace takes a space at the start for its own.
    assert text.lstrip(" ") == vocabularies.TEXT.lstrip(" ")
    shown = 0
    for _ in range(3000):
        ids = rng.choices(ordinary, k=rng.randint(1, 4))
        found = text_of(ids, spelled, first)
        try:
            text = found.decode()
        except UnicodeDecodeError:
            continue
        shown += 1
        assert text == tokenizer.decode(ids), ids
    assert shown > 300


def test_a_decoder_that_is_not_known_is_refused():
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    model.add_special_tokens(["</s>"])
    with pytest.raises(UserError, match="decoder is none, for which"):
        token_bytes(Tokenizer(model, bos=None, eos="</s>", pad=None))
    model.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(UserError, match="decoder is WordPiece, for which"):
        token_bytes(Tokenizer(model, bos=None, eos="</s>", pad=None))
