"""A small corpus for the tests of data."""

import os
import random

from jaxgen.data.config import DataConfig
from jaxgen.data.sources import Source

WORDS = ("def", "return", "self", "value", "import", "for", "in", "open", "é", "漢字", "😀")


def texts(count, seed=0, longest=20):
    """Documents of 1 to `longest` words; every one is unlike the others."""
    rng = random.Random(seed)
    return [
        f"{seed}.{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))
        for number in range(count)
    ]


def write(folder, documents):
    folder.mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents):
        path = folder / f"{number:05d}.txt"
        path.write_text(document, encoding="utf-8")
        os.utime(path, (0, 0))  # Written again, it is still the same file.
    return Source(kind="text", path=f"{folder}/*.txt")


def config(tmp_path, count=60, **fields):
    """A config over `count` text files, with its cache in `tmp_path`."""
    source = write(tmp_path / "texts", texts(count))
    fields = {"sources": (source,), "eval_fraction": 0.1, **fields}
    return DataConfig(cache_dir=str(tmp_path / "cache"), **fields)
