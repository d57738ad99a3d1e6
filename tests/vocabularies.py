"""Small tokenizers of every kind that is read, and text with characters of one to four bytes."""

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.formats.gguf_tokenizer import tokenizer_files

TEXT = ' {"a b":\t[1.5e-3, true], "é漢😀": "\\n  x"}\n'
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    *"▁abnul{}[]:,.-0123456789",
    '"',
    '▁"',
    '":',
    "▁{",
    "▁▁",
    "▁▁a",
    "null",
    "▁null",
    "é",
    "true",
]


def bytes_only():
    return Tokenizer.from_bytes()


def trained():
    return Tokenizer.train([TEXT * 3, "the name of the thing is a thing"], 330)


def chat():
    """Bytes with special tokens and ordinary added ones, one of them no ASCII."""
    model = tokenizers.Tokenizer.from_str(bytes_only().json)
    model.add_special_tokens(["<|im_end|>", "[TOOL_CALLS]"])
    model.add_tokens(["<tool_call>", "</tool_call>", " 漢 é"])
    return Tokenizer(model, bos=None, eos="<|im_end|>", pad=None)


def unigram():
    """SentencePiece as T5's and others' converters write it, where all first spaces go."""
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -2.0) for piece in PIECES)]
    vocab += [(piece, -9.0) for piece in BYTE_PIECES]
    model = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    model.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return Tokenizer(model, bos="<s>", eos="</s>", pad=None)


def gguf(tmp_path, *, prefix):
    """SentencePiece as a GGUF file has it."""
    tokens = ["<unk>", "<s>", "</s>", *BYTE_PIECES, *PIECES]
    facts = {
        "tokens": tokens,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "scores": [-float(n) for n in range(len(tokens))],
        "model": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": prefix,
    }
    files = tokenizer_files({f"tokenizer.ggml.{key}": value for key, value in facts.items()})
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return Tokenizer.load(str(tmp_path))


def gguf_bytes(tmp_path):
    """Byte-level BPE as a GGUF file has it."""
    alphabet = [
        piece for piece, _ in sorted(json.loads(bytes_only().json)["model"]["vocab"].items())
    ]
    tokens = ["<|endoftext|>", *alphabet, "Ġt", "Ġth"]
    facts = {
        "tokens": tokens,
        "token_type": [3] + [1] * (len(tokens) - 1),
        "merges": ["Ġ t", "Ġt h"],
        "model": "gpt2",
        "pre": "qwen2",
        "eos_token_id": 0,
    }
    files = tokenizer_files({f"tokenizer.ggml.{key}": value for key, value in facts.items()})
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return Tokenizer.load(str(tmp_path))


KINDS = {
    "bytes": lambda path: bytes_only(),
    "trained": lambda path: trained(),
    "chat": lambda path: chat(),
    "unigram": lambda path: unigram(),
    "gguf": lambda path: gguf(path, prefix=True),
    "gguf-no-prefix": lambda path: gguf(path, prefix=False),
    "gguf-bytes": gguf_bytes,
}
