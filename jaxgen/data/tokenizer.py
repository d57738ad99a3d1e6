"""Text to token ids and back: bytes, a Hugging Face `tokenizer.json`, or BPE trained on a corpus.

All three are one `tokenizers` model behind one class, so they are saved and loaded the same way,
and every one of them is a file that other software can read.
"""

import hashlib
import json
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from jaxgen.data import sources
from jaxgen.data.tokenizer_config import TEMPLATE, read_config, read_template, token_name
from jaxgen.errors import UserError

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

# Names by which published tokenizers call them, for a tokenizer.json without tokenizer_config.json.
_KNOWN_BOS = (BOS, "<s>", "<bos>", "[BOS]", "<|startoftext|>")
_KNOWN_EOS = (EOS, "<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")
_KNOWN_PAD = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")

# Words, numbers of up to three digits, punctuation and runs of space are never merged across.
# Source: the pattern of the Llama 3 tokenizer, which keeps a line's indentation in one token.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A longer text is encoded in parts cut at line ends: an Encoding takes some 100 bytes a token.
_MAX_CHARS = 1 << 20


class Tokenizer:
    """A vocabulary with an end of text; immutable, and safe to share between threads.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id: the token that begins a text, or None where the vocabulary has none.
        eos_id: the token that ends a text.
        begin: the ids that stand before every text, in training as in prompts.
        chat_template: what writes a conversation as text, see `chat.render`; None where the
            tokenizer is not of a chat model.
        special_names: what chat templates may name: bos_token, eos_token, ...
        special_ids: the tokens that no text stands for.
        pad_id: what fills a row that has no more text; the model never sees it as a target.
        fingerprint: a hash of everything that changes what `encode` returns.
    """

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        *,
        bos: str | None,
        eos: str,
        pad: str | None,
        begin: tuple[int, ...] | None = None,
        chat_template: str | None = None,
        config: Mapping[str, Any] = types.MappingProxyType({}),
    ):
        """Makes a tokenizer.

        Args:
            model: of the library; it is changed.
            bos: name of the token that begins a text.
            eos: name of the token that ends a text.
            pad: name of the token that fills; None: `eos`.
            begin: None: `bos`, where there is one.
            chat_template: see above.
            config: what else tokenizer_config.json says, to be written again by `save`.
        """
        model.no_truncation()
        model.no_padding()
        self.json = model.to_str()
        # It would move the offsets of tokens, and what it adds is `begin`.
        model.post_processor = None  # type: ignore[assignment]
        self._special = model
        # A document that quotes "<|end_of_text|>" must not end there.
        self._plain = tokenizers.Tokenizer.from_str(self.json)
        self._plain.encode_special_tokens = True
        self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.vocab_size = max(model.get_vocab().values()) + 1
        self.bos_id = None if bos is None else self._id(bos)
        self.eos_id = self._id(eos)
        self.pad_id = self.eos_id if pad is None else self._id(pad)
        self.special_ids = frozenset(
            n for n, t in model.get_added_tokens_decoder().items() if t.special
        )
        usual = () if self.bos_id is None else (self.bos_id,)
        self.begin = usual if begin is None else begin
        self.chat_template = chat_template
        self._config = dict(config)
        named = {key: token_name(config[key]) for key in config if key.endswith("_token")}
        self.special_names = {k: name for k, name in (named | self._names).items() if name}
        # Without what adds `begin`, so that `save` may put that into the file.
        key = model.to_str() + json.dumps(self._names, sort_keys=True)
        if self.begin != usual:
            key += json.dumps(self.begin)
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()

    @staticmethod
    def from_bytes() -> "Tokenizer":
        """Returns the tokenizer whose ids 0 to 255 are the bytes of UTF-8."""
        return _wrap(models.BPE(vocab=byte_alphabet(), merges=[]), split=None)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Returns a byte-level BPE of exactly `vocab_size` tokens, where the texts hold that many.

        Raises:
            UserError: `vocab_size` has no room for the 256 bytes and the two special tokens.
        """
        if vocab_size < 258:
            raise UserError(
                f"bpe_vocab_size={vocab_size} is less than the 256 bytes and 2 special tokens; "
                "use at least 258"
            )
        model = _wrap(models.BPE(), split=_SPLIT)._special
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return Tokenizer(model, bos=BOS, eos=EOS, pad=None)

    @staticmethod
    def load(path: str) -> "Tokenizer":
        """Returns the tokenizer in a `tokenizer.json`, or in a folder that holds one.

        A `tokenizer_config.json` beside it names the special tokens; without one they are found by
        the names that published tokenizers use. A text begins with what the file's own
        post-processor puts there, unless `add_bos_token` of that config says otherwise.

        Raises:
            UserError: nothing is there, it is not a tokenizer, or it has no end of text.
        """
        path = str(path).rstrip("/")
        folder, _, name = path.rpartition("/")
        if not name.endswith(".json"):
            folder, name = path, "tokenizer.json"
            if os.path.exists(path) and not os.path.isdir(path):
                raise UserError(f"{path} is not a tokenizer; give a tokenizer.json or its folder")
        folder = folder or "."
        text = sources.read_bytes(f"{folder}/{name}")
        try:
            model = tokenizers.Tokenizer.from_str(text.decode())
        except Exception as error:  # The library raises plain Exception on a file of another kind.
            raise UserError(
                f"{path} is not a tokenizer ({error}); give a Hugging Face tokenizer.json, "
                "or use data.tokenizer=bpe or bytes"
            ) from None
        config = read_config(f"{folder}/tokenizer_config.json")
        _add_tokens(model, config)
        names = {key: token_name(config.get(key)) for key in ("bos_token", "eos_token")}
        vocab = model.get_vocab()
        eos = names["eos_token"] or next((t for t in _KNOWN_EOS if t in vocab), None)
        if eos is None:
            raise UserError(
                f"{path} has no end-of-text token; put a tokenizer_config.json with eos_token "
                "beside it"
            )
        bos = names["bos_token"] if config else next((t for t in _KNOWN_BOS if t in vocab), None)
        pad = token_name(config.get("pad_token")) or next(
            (t for t in _KNOWN_PAD if t in vocab), None
        )
        begin, template = _read_begin(model, config), read_template(folder, config)
        return Tokenizer(
            model, bos=bos, eos=eos, pad=pad, begin=begin, chat_template=template, config=config
        )

    def save(self, folder: str) -> None:
        """Writes the files that `load` reads into a folder at any location.

        They are `tokenizer.json`, `tokenizer_config.json` and, for a chat model,
        `chat_template.jinja`.
        """
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config, **self._names}
        # The template has its own file; code of others does not come along.
        config = {k: v for k, v in config.items() if k not in ("chat_template", "auto_map")}
        if self.begin in ((), (self.bos_id,)):
            config["add_bos_token"] = self.begin != ()
        files = {
            "tokenizer.json": self._json_with_begin(),
            "tokenizer_config.json": json.dumps(config, indent=2),
            TEMPLATE: self.chat_template,
        }
        for name, text in files.items():
            if text is not None:
                sources.write_bytes(f"{folder}/{name}", text.encode())

    def _json_with_begin(self) -> str:
        """Returns the file with our begin of text, which transformers looks for in it alone."""
        model = tokenizers.Tokenizer.from_str(self.json)
        if model.post_processor is not None or not self.begin or self.begin != (self.bos_id,):
            return self.json
        bos = self._names["bos_token"]
        model.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_id)]
        )
        return model.to_str()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of a text, without begin and end.

        Args:
            text: any text.
            special: whether the names of special tokens in the text stand for those tokens.
        """
        model = self._special if special else self._plain
        return model.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str, *, special: bool = True) -> list[int]:
        """Returns the ids from which a model goes on: the begin of text, then the text."""
        return [*self.begin, *self.encode(text, special=special)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns each text's int32 ids, and the characters [start, end) of each, using all cores.

        Names of special tokens stand for those tokens; nothing is added.
        """
        return [
            (np.asarray(found.ids, np.int32), np.asarray(found.offsets, np.int64).reshape(-1, 2))
            for found in self._special.encode_batch(list(texts), add_special_tokens=False)
        ]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns each text as int32 ids with its begin and end, using all cores."""
        parts = [_split_long(text) for text in texts]
        flat = [part for document in parts for part in document]
        encoded = iter(self._plain.encode_batch_fast(flat, add_special_tokens=False))
        documents = []
        for document in parts:
            ids = [np.asarray(next(encoded).ids, np.int32) for _ in document]
            ends = np.asarray(self.begin, np.int32), np.asarray([self.eos_id], np.int32)
            documents.append(np.concatenate([ends[0], *ids, ends[1]]))
        return documents

    def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """Returns the text of ids; bytes that are not UTF-8 read as U+FFFD.

        Args:
            ids: token ids.
            special: whether special tokens appear by name or are left out.
        """
        return self._special.decode([int(token) for token in ids], skip_special_tokens=not special)

    def names(self) -> list[str | None]:
        """Returns what the vocabulary calls each id; None for one that it does not have."""
        return [self._special.id_to_token(n) for n in range(self.vocab_size)]

    def _id(self, token: str) -> int:
        number = self._special.token_to_id(token)
        if number is None:
            raise UserError(
                f"the tokenizer has no token {token!r}, which its tokenizer_config.json names; "
                "correct the name there"
            )
        return number


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that a model of `vocab_size` tokens has a row for every token.

    Raises:
        UserError: it has not.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and model.vocab_size={vocab_size}; "
            f"set model.vocab_size to {-(-tokenizer.vocab_size // 128) * 128}"
        )


def _wrap(model: Any, split: str | None) -> Tokenizer:
    """Returns a byte-level tokenizer with the two special tokens of our own vocabularies."""
    tokenizer = tokenizers.Tokenizer(model)
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if split is None:
        tokenizer.pre_tokenizer = by_byte
    else:
        words = pre_tokenizers.Split(Regex(split), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (BOS, EOS)])
    return Tokenizer(tokenizer, bos=BOS, eos=EOS, pad=None)


def byte_alphabet() -> dict[str, int]:
    """Returns byte-level BPE's character for each byte, with the byte as its id.

    Source: GPT-2's encoder: printable Latin-1 characters stand for themselves, the others take the
    code points from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


def _split_long(text: str) -> list[str]:
    parts = []
    while len(text) > _MAX_CHARS:
        cut = text.rfind("\n", 0, _MAX_CHARS) + 1 or _MAX_CHARS
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]


def _add_tokens(model: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Adds the tokens that tokenizer_config.json alone names, as transformers does."""
    there = {token.content for token in model.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        named = {
            int(number): AddedToken(token["content"], **{k: token[k] for k in flags if k in token})
            for number, token in (config.get("added_tokens_decoder") or {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"tokenizer_config.json: added_tokens_decoder is no table of tokens ({error!r}); "
            "correct it"
        ) from None
    for number, token in sorted(named.items(), key=lambda item: item[0]):
        if token.content in there:
            continue
        model.add_tokens([token])
        if (found := model.token_to_id(token.content)) != number:
            raise UserError(
                f"tokenizer_config.json has {token.content!r} as {number} and it is {found} by "
                "tokenizer.json; correct the one that is wrong"
            )


def _read_begin(model: tokenizers.Tokenizer, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns what stands before a text; None for the begin of text, where there is one."""
    add = config.get("add_bos_token")
    if config.keys() == {"tokenizer_class", "bos_token", "eos_token", "pad_token"}:
        # Written by `save` when there was always a begin of text.
        add = True
    if add is not None:
        return None if add else ()
    plain, whole = model.encode("a", add_special_tokens=False).ids, model.encode("a").ids
    starts = (n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])
