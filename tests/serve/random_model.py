"""A model whose every logit is noise: it draws any token that it may."""

import numpy as np


def allowed(constraint, vocab_size):
    mask = constraint.mask()
    assert mask.dtype == np.uint32
    assert mask.shape == (-(-vocab_size // 32),)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any()
    return np.flatnonzero(bits)


def answer(constraint, tokenizer, spelled, rng, *, vocab_size, steps=60, limit=3000):
    """Draws an answer: at random at first, and then towards its end."""
    ids = []
    while len(ids) < limit:
        tokens = allowed(constraint, vocab_size)
        assert len(tokens)
        others = tokens[tokens != tokenizer.eos_id]
        if len(others) < len(tokens) and (not len(others) or len(ids) >= steps):
            return ids
        if len(others) < len(tokens) and rng.random() < 0.3:
            return ids
        if len(ids) >= steps:
            others = [min(others, key=lambda token: _closing(spelled[token]))]
        ids.append(int(rng.choice(others)))
        constraint.accept(ids[-1])
        assert constraint.failed is None
    raise AssertionError("the answer does not end")


def _closing(text):
    """How far from an end a token leaves JSON: brackets and quotes close it, blanks do nothing."""
    order = [b'"', b"}", b"]", b"Z", b"0", b"1", b"e", b"l"]
    return order.index(text) if text in order else len(order) + text.isspace() * 10 + len(text)
