"""A trained model, wherever it is from: a run, one of its checkpoints, a Hugging Face folder."""

import abc
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax
from etils import epath
from jax.sharding import Mesh

from jaxgen import config as run_config
from jaxgen.checkpoint import address
from jaxgen.checkpoint.manager import CheckpointManager
from jaxgen.checkpoint.record import Record
from jaxgen.config import CHECKPOINTS, TOKENIZER, ServeConfig, TrainConfig
from jaxgen.data import sources
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.formats import folder
from jaxgen.formats.families import Family, family_for, family_of
from jaxgen.models.config import ComputeConfig, DecoderConfig
from jaxgen.models.decoder import Decoder
from jaxgen.nn.schedule import Pipeline
from jaxgen.sharding import MeshConfig, Rules, abstract


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """How a model's makers would have it write; None where they say nothing."""

    stop_ids: tuple[int, ...]
    """Each of these tokens ends an answer."""
    temperature: float | None = None
    """0 for the likeliest token."""
    top_k: int | None = None
    """0 for all."""
    top_p: float | None = None
    """1 for all."""
    min_p: float | None = None
    """0 for all."""
    repetition_penalty: float | None = None
    """1 for none."""


class Pretrained(abc.ABC):
    """A trained model that has not been read yet.

    Attributes:
        location: as it was given.
        config: the shape of the model.
        compute: how a run computed it; the defaults for a Hugging Face folder.
        rules: likewise.
        tokenizer_location: what `Tokenizer.load` reads.
    """

    location: str
    config: DecoderConfig
    compute: ComputeConfig = ComputeConfig()
    rules: Rules = Rules()
    tokenizer_location: str

    @property
    @abc.abstractmethod
    def stored_dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """Of the weights in the files."""

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the weights in memory; float32 holds every float16."""
        return "bfloat16" if self.stored_dtype == "bfloat16" else "float32"

    @property
    @abc.abstractmethod
    def generation(self) -> GenerationDefaults:
        """How its makers would have it write."""

    @property
    @abc.abstractmethod
    def published(self) -> Mapping[str, Any]:
        """What its makers published beside the weights: "config" for config.json and "generation"
        for generation_config.json or None. A run that starts from it keeps them; empty for what
        was trained from nothing."""

    @property
    @abc.abstractmethod
    def exact_location(self) -> str:
        """Where the same weights will be, whatever else is added there."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Changes with the files of the weights, of which it reads little."""

    @abc.abstractmethod
    def read(self, abstract_model: Decoder) -> Decoder:
        """Returns the weights in the shapes, dtypes and shardings of an abstract model.

        Raises:
            UserError: they are damaged, or of another model.
        """

    @abc.abstractmethod
    def write(self, location: str, model: Decoder, dtype: str | None = None) -> None:
        """Writes a Hugging Face folder of this model, whose weights are `model`.

        Every process calls this, and process 0 writes.

        Args:
            location: an empty or new folder, at any location.
            model: what `read` returned.
            dtype: float32, bfloat16 or float16; None for `stored_dtype`.
        """

    def write_adapter(self, location: str) -> None:
        """Writes the adapters of a run with `lora` as a folder that `peft` loads.

        Raises:
            UserError: there are none, or none that the family's tensors have a place for.
        """
        raise UserError(f"{self.location} has no adapters; leave --adapter out")

    def tokenizer(self) -> Tokenizer:
        """Returns its tokenizer, which is read once."""
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_location)

    def serve_config(self, mesh: MeshConfig | None = None) -> ServeConfig:
        """Returns what it is run with; by default all devices split the weights."""
        return ServeConfig(self.config, mesh or MeshConfig(), self.rules, self.compute)


def open_model(location: str | os.PathLike) -> Pretrained:
    """Returns the model at a location, of which only configs are read.

    Args:
        location: a run directory, RUN/checkpoints/STEP, or a Hugging Face folder; local, gs://,
            s3:// and, for a Hugging Face folder, whatever else fsspec reads.

    Raises:
        UserError: there is no model, or one that is not supported.
    """
    text = os.fspath(location).rstrip("/")
    address.prepare(text)
    given = read_json(f"{text}/{run_config.FILE_NAME}")
    if given and ("architectures" in given or "model_type" in given):
        from jaxgen.published import Published

        return Published(text, given)
    run = _Run(text)
    if run.run.lora is None:
        return run
    from jaxgen.tuned import Tuned

    return Tuned(run)


def open_noted(note: Mapping[str, str]) -> Pretrained:
    """Returns the weights that a run started from, as its checkpoints note them.

    Raises:
        UserError: they are not there any more, or others are.
    """
    origin = open_model(note["location"])
    if origin.fingerprint != note["fingerprint"]:
        raise UserError(
            f"{note['location']} is not what it was when the run began: its fingerprint is "
            f"{origin.fingerprint} and was {note['fingerprint']}; restore it, or start another run"
        )
    return origin


def load_model(
    model: str | os.PathLike | Pretrained,
    config: ServeConfig | TrainConfig,
    mesh: Mesh,
    dtype: str | None = None,
) -> tuple[Decoder, Tokenizer]:
    """Returns a trained model, read straight into its shards on any mesh, and its tokenizer.

    Args:
        model: what `open_model` takes or returns.
        config: the shape of the model, and how it is run.
        mesh: where.
        dtype: of the parameters, float32 or bfloat16; None for that of the stored ones.

    Raises:
        UserError: nothing is there, or it is damaged, or the model does not fit the mesh.
    """
    config.model.check_mesh(mesh, config.rules)
    pretrained = model if isinstance(model, Pretrained) else open_model(model)
    tokenizer = pretrained.tokenizer()
    return pretrained.read(abstract_model(config, mesh, dtype or pretrained.dtype)), tokenizer


def abstract_model(config: ServeConfig | TrainConfig, mesh: Mesh, dtype: str) -> Decoder:
    """Returns the shapes and shardings of a model's parameters, in a dtype; computes nothing."""

    def make() -> Decoder:
        # Without repeats, as models are stored.
        compute = dataclasses.replace(config.compute, pipeline=Pipeline())
        key = jax.random.key(0)
        model = Decoder(config.model, key=key, compute=compute, rules=config.rules)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), model)

    return abstract(make, mesh)


def check_empty(location: str) -> None:
    """Checks that a folder can be written without losing another.

    Raises:
        UserError: something is there.
    """
    address.prepare(location)
    sources.check_empty(location)


def split_location(location: str | os.PathLike) -> tuple[epath.Path, int | None]:
    """Returns the run directory, and the step if `location` is RUN/checkpoints/STEP.

    Raises:
        UserError: it is neither, or its store cannot be reached.
    """
    path = address.resolve(location)
    with address.reaching(path):
        if (path / run_config.FILE_NAME).exists():
            return path, None
    if path.name.isdecimal() and path.parent.name == CHECKPOINTS:
        return path.parent.parent, int(path.name)
    raise UserError(
        f"{location} is no model; give a run directory that jaxgen train made, such as runs/tiny, "
        "a checkpoint, runs/tiny/checkpoints/00000200, or a Hugging Face folder"
    )


class _Run(Pretrained):
    """What `jaxgen train` made; weights are of its newest checkpoint, or of the one given."""

    def __init__(self, location: str):
        self.location = location
        self.run_dir, self.step = split_location(location)
        self.run = run_config.read_config(self.run_dir)
        self.config, self.compute, self.rules = self.run.model, self.run.compute, self.run.rules
        self.tokenizer_location = str(self.run_dir / TOKENIZER)
        self.checkpoints = CheckpointManager(self.run_dir / CHECKPOINTS)

    @functools.cached_property
    def record(self) -> Record:
        """Of the checkpoint whose model is read."""
        return self.checkpoints.find(self.step, only="model")

    @property
    def exact_location(self) -> str:
        return str(self.checkpoints.folder(self.record.step))

    @property
    def fingerprint(self) -> str:
        return short_hash(repr(self.record).encode())

    @property
    def stored_dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        return "float32"

    @functools.cached_property
    def generation(self) -> GenerationDefaults:
        eos_id = self.tokenizer().eos_id
        if not self.published:
            return GenerationDefaults((eos_id,))
        from jaxgen.published import generation_of

        return generation_of(self.published, self.config.vocab_size, eos_id)

    @property
    def published(self) -> Mapping[str, Any]:
        return (self.record.metadata.get("init") or {}).get("published") or {}

    def read(self, abstract_model: Decoder) -> Decoder:
        return self.checkpoints.restore(abstract_model, self.record.step, only="model").state

    def write(self, location: str, model: Decoder, dtype: str | None = None) -> None:
        family, given = self._family()
        folder.write_folder(
            location,
            family,
            given,
            model,
            dtype=dtype or self.stored_dtype,
            tokenizer=self.tokenizer(),
            generation=self.published.get("generation"),
        )

    def _family(self) -> tuple[Family, Mapping[str, Any]]:
        """The family to write it as, and its config.json: that of what it started from, if any."""
        if not self.published:
            return family_for(self.config)
        given = self.published["config"]
        family = family_of(given)
        # Fields that weights do not depend on may have changed.
        return family, given if family.read(given) == self.config else family.write(self.config)


def short_hash(content: bytes) -> str:
    """Returns what tells this content from other."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_json(url: str) -> dict[str, Any] | None:
    """Returns a JSON file's object, or None if there is no such file."""
    if not sources.exists(url):
        return None
    try:
        return dict(json.loads(sources.read_bytes(url)))
    except (ValueError, TypeError) as error:
        raise UserError(f"{url} is not a JSON object ({error}); correct it") from None
