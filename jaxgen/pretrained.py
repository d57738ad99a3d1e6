"""A model with its weights, wherever it is from (stand-in: run directories only)."""

import dataclasses
import functools
import os

from jaxgen.checkpoint.manager import CheckpointManager
from jaxgen.config import CHECKPOINTS, TOKENIZER, read_config
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.serve.load import split_location


def open_model(location):
    run_dir, step = split_location(location)
    return Pretrained(location, run_dir, step, read_config(run_dir))


@dataclasses.dataclass
class Pretrained:
    location: str
    run_dir: object
    step: int | None
    train: object

    @property
    def config(self):
        return self.train.model

    @property
    def tokenizer_location(self):
        return str(self.run_dir / TOKENIZER)

    def tokenizer(self):
        return Tokenizer.load(self.tokenizer_location)

    @functools.cached_property
    def _pinned(self):
        with CheckpointManager(self.run_dir / CHECKPOINTS) as checkpoints:
            return checkpoints.latest_step() if self.step is None else self.step

    @property
    def exact_location(self):
        return os.path.abspath(self.run_dir / CHECKPOINTS / f"{self._pinned:08d}")

    @property
    def fingerprint(self):
        import zlib
        from pathlib import Path

        return f"{zlib.crc32((Path(self.exact_location) / 'jaxgen.json').read_bytes()):08x}"

    def read(self, abstract_model):
        with CheckpointManager(self.run_dir / CHECKPOINTS) as checkpoints:
            return checkpoints.restore(abstract_model, step=self._pinned, only="model").state


def open_noted(note):
    origin = open_model(note["location"])
    if origin.fingerprint != note["fingerprint"]:
        raise UserError(
            f"{note['location']} is not what it was when the run began (fingerprint "
            f"{origin.fingerprint}, then {note['fingerprint']}); restore its files, or start anew"
        )
    return origin
