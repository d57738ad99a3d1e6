"""The vocabulary in a GGUF file as tokenizer.json and tokenizer_config.json.

GGUF stores tokens, their types, and either merges (byte-level BPE) or scores (SentencePiece). What
cuts a text into words it only names; the patterns behind the names are those of the published
tokenizers.

Source: llama.cpp, src/llama-vocab.cpp: names, and what begins a text where the file does not say.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgen.errors import UserError

# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    """The pattern of the Llama 3 and Qwen 2 tokenizers, which differ in how they cut numbers."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
    )


def _cased(ending: str, digits: str) -> str:
    """The pattern of the o200k and Tekken tokenizers, which cut where the case changes."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
    )


# tokenizer.ggml.pre -> the patterns that cut a text, one after the other.
_PATTERNS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_words(r"\p{N}{1,3}"),),
    "qwen2": (_words(r"\p{N}"),),
    "tekken": (_cased("", r"\p{N}"),),
    "gpt-4o": (_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_SAME = {
    "olmo": "gpt-2",
    "phi-2": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe",
    "dbrx": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "llama4": "gpt-4o",
}
# Those whose words are looked up whole before they are merged, and whose texts have a begin.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")


def tokenizer_files(facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of tokenizer.json and tokenizer_config.json.

    Args:
        facts: the key-value pairs of the GGUF file.

    Raises:
        UserError: the vocabulary is of a kind, or cut by a rule, that is not known.
    """
    found = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in facts.items()
        if key.startswith("tokenizer.ggml.")
    }
    tokens, kind = found["tokens"], found.get("model")
    if kind == "gpt2":
        parts, begins = _byte_level(found)
    elif kind == "llama":
        parts, begins = _sentencepiece(found), True
    else:
        raise UserError(f"its tokenizer {kind} is not supported; use one of gpt2 (BPE), llama")
    names = {
        f"{name}_token": tokens[found[f"{key}_token_id"]]
        for name, key in _ROLES.items()
        if f"{key}_token_id" in found
    }
    bos = names.get("bos_token")
    begins = bool(found.get("add_bos_token", begins)) and bos is not None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": begins,
        "clean_up_tokenization_spaces": False,
    }
    if "tokenizer.chat_template" in facts:
        config["chat_template"] = facts["tokenizer.chat_template"]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, found["token_type"]),
        "post_processor": _begin(bos, found["bos_token_id"]) if begins else None,
        **parts,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
    }


_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _byte_level(found: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns the parts of a byte-level BPE, and whether its texts usually have a begin."""
    pre = found.get("pre")
    if pre is None or _SAME.get(pre, pre) not in _PATTERNS:
        known = ", ".join(sorted([*_PATTERNS, *_SAME]))
        raise UserError(
            f"its tokenizer.ggml.pre={pre} is not supported, so its texts would be cut wrongly; "
            f"use a file with one of {known}"
        )
    pre_tokenizers = [
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
        for one in _PATTERNS[_SAME.get(pre, pre)]
    ]
    by_byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    by_byte["use_regex"] = False
    parts = {
        "normalizer": {"type": "NFC"} if _SAME.get(pre, pre) == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pre_tokenizers, by_byte]},
        "decoder": by_byte,
        "model": _bpe(
            found["tokens"],
            [merge.split(" ", 1) for merge in found["merges"]],
            ignore_merges=pre in _WHOLE_WORDS,
        ),
    }
    return parts, pre in _WHOLE_WORDS


def _sentencepiece(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parts of a BPE whose merges follow from the scores of its pieces."""
    tokens, scores, types = found["tokens"], found["scores"], found["token_type"]
    ids = {token: n for n, token in enumerate(tokens)}
    mergeable = [n for n, kind in enumerate(types) if kind in (_NORMAL, _USER_DEFINED)]
    merges = []
    # The pair that makes the piece with the highest score is merged first.
    for n in sorted(mergeable, key=lambda n: (-scores[n], n)):
        cuts = [(tokens[n][:cut], tokens[n][cut:]) for cut in range(1, len(tokens[n]))]
        cuts = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        merges += sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]]))
    space, prefix = {"String": "▁"}, found.get("add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders = [
        {"type": "Replace", "pattern": space, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    normalizers = [{"type": "Prepend", "prepend": "▁"}, spaces]
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if prefix else spaces,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders if prefix else decoders[:-1]},
        "model": _bpe(
            tokens,
            merges,
            unk_token=tokens[found["unknown_token_id"]],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _bpe(tokens: Sequence[str], merges: Sequence[Sequence[str]], **options: Any) -> dict[str, Any]:
    usual = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    vocab = {token: n for n, token in enumerate(tokens)}
    return {**usual, **options, "vocab": vocab, "merges": merges}


def _added(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before it is cut."""
    fixed = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": n, "content": token, **fixed, "special": kind == _CONTROL}
        for n, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _begin(bos: str, bos_id: int) -> dict[str, Any]:
    """A post-processor that puts a token before every text."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, *texts],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
