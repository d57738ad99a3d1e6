"""What a model is trained on, as a value."""

import dataclasses

from jaxgen.data.sources import Source
from jaxgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a model is trained on."""

    sources: tuple[Source, ...] = (Source(),)
    """Where the documents come from; the weights set their shares."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe` (trained on the sources), or a `tokenizer.json` or its folder, at any URL."""
    bpe_vocab_size: int = 8192
    """Tokens that `tokenizer=bpe` trains; of no effect otherwise."""
    cache_dir: str = ""
    """Local folder for packed rows and trained tokenizers. Empty: `$XDG_CACHE_HOME/jaxgen/data`, or
    `~/.cache/jaxgen/data`."""
    eval_fraction: float = 0.01
    """Share of the text that is held out from training."""
    shuffle_seed: int = 0
    """Seed of the order of rows and of the mixture."""
    prefetch: int = 2
    """Batches that are made ahead of the step that needs them."""

    def __post_init__(self):
        if not self.sources:
            raise UserError("data.sources is empty; give at least one source")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"data.eval_fraction={self.eval_fraction}; use a number in [0, 1)")
        if self.prefetch < 1:
            raise UserError(f"data.prefetch={self.prefetch}; use at least 1")
        if "://" in self.cache_dir:
            raise UserError(
                f"data.cache_dir={self.cache_dir} is a URL; packed rows are read at random, so use "
                "a folder on this machine"
            )
