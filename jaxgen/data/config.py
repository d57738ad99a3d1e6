"""What a model is trained on, as a value."""

import dataclasses

from jaxgen.data.sources import Source
from jaxgen.errors import UserError
from jaxgen.ranges import Count, Seed, ShareBelowOne, check_ranges


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a model is trained on."""

    sources: tuple[Source, ...] = (Source(),)
    """Where the documents come from; the weights set their shares."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe` (trained on the sources), or a `tokenizer.json` or its folder, at any URL."""
    bpe_vocab_size: Count = 8192
    """Tokens that `tokenizer=bpe` trains; of no effect otherwise."""
    cache_dir: str = ""
    """Local folder for packed rows and trained tokenizers. Empty: `$XDG_CACHE_HOME/jaxgen/data`, or
    `~/.cache/jaxgen/data`."""
    eval_fraction: ShareBelowOne = 0.01
    """Share of the text that is held out from training."""
    shuffle_seed: Seed = 0
    """Seed of the order of rows and of the mixture."""
    prefetch: Count = 2
    """Batches that are made ahead of the step that needs them."""

    def __post_init__(self):
        check_ranges(self, "data.")
        if not self.sources:
            raise UserError("data.sources is empty; give at least one source")
        if "://" in self.cache_dir:
            raise UserError(
                f"data.cache_dir={self.cache_dir} is a URL; packed rows are read at random, so use "
                "a folder on this machine"
            )
