"""What tokens stand for in bytes, of which a character may take several tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgen.data.tokenizer import Tokenizer, byte_alphabet
from jaxgen.errors import UserError

_BYTES = byte_alphabet()
_ALONE = {"ByteLevel", "ByteFallback", "Metaspace"}
_BESIDE = {"Replace", "Fuse", "Strip"}


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Returns what each token stands for inside a text; nothing, for those that no text has.

    Raises:
        UserError: the tokenizer makes text from tokens in a way that is not known.
    """
    decoder = json.loads(tokenizer.json)["decoder"] or {"type": "none"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if not kinds & _ALONE or kinds - _ALONE - _BESIDE:
        raise UserError(
            f"the tokenizer's decoder is {', '.join(sorted(kinds))}, for which neither grammars "
            "nor logprobs are supported; use a model with a byte-level or SentencePiece tokenizer"
        )
    spelled = [b""] * tokenizer.vocab_size
    for n, name in enumerate(tokenizer.names()):
        if name is not None and n not in tokenizer.special_ids:
            spelled[n] = _spelling(name, steps)
    return spelled


def at_start(tokenizer: Tokenizer, spelled: Sequence[bytes]) -> dict[int, bytes]:
    """Returns what tokens stand for that read otherwise at the start of a text.

    SentencePiece begins each text with a space of its own, which is dropped again.

    Args:
        tokenizer: of the tokens.
        spelled: what `token_bytes` returns for it.
    """
    spaced = [n for n, spelling in enumerate(spelled) if spelling.startswith(b" ")]
    found = {n: tokenizer.decode([n]) for n in spaced}
    return {
        n: text.encode() for n, text in found.items() if text != spelled[n].decode(errors="replace")
    }


def _spelling(name: str, steps: Sequence[Mapping[str, Any]]) -> bytes:
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                if all(char in _BYTES for char in name):
                    return bytes(_BYTES[char] for char in name)
            case {"type": "ByteFallback"}:
                if found := re.fullmatch("<0x([0-9A-Fa-f]{2})>", name):
                    return bytes.fromhex(found[1])
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                name = name.replace(old, new)
            case {"type": "Metaspace", "replacement": old}:
                name = name.replace(old, " ")
    return name.encode()
