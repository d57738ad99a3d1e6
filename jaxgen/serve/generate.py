"""Text from a decoder, for a batch of prompts of any lengths."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import reshard

from jaxgen.data.chat import encode_prompt
from jaxgen.data.tokenizer import Tokenizer, check_vocab
from jaxgen.errors import UserError
from jaxgen.models.decoder import Decoder
from jaxgen.nn.attention import mesh_device
from jaxgen.nn.init import Elementwise, Precise
from jaxgen.serve.decode import Rows, decode, prefill
from jaxgen.serve.request import SamplingConfig

# Longer prompts are read this many tokens at a time: scores are [B, heads, C, S] in fp32.
CHUNK_TOKENS = 512
SMALLEST_BUCKET = 16
NO_STOP = -1

Dtype = Literal["bfloat16", "float32"]


class Generator:
    """Generates from one model; keeps the programs that it compiles, one pair for each bucket.

    Prompts are padded on the left, so that all rows write the same slot of the cache, and lengths
    and batches are rounded up to few sizes, so that few programs serve all of them.

    Use it inside the `jax.set_mesh(mesh)` of the model. Rows are spread over `data` and `fsdp`, kv
    heads over `tensor`.
    """

    def __init__(self, model: Decoder, *, dtype: Dtype | None = None):
        """Makes a copy of the model for decoding; see `for_serving`."""
        self.model = for_serving(model, dtype)
        self._programs: dict[Any, jax.stages.Compiled] = {}

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig],
        stop_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """Returns the tokens that follow each prompt, without the stop id that ended them.

        Args:
            prompts: token ids, each at least one.
            sampling: for all prompts, or one for each.
            stop_ids: tokens that end a text.

        Raises:
            UserError: a prompt is empty, too long for the model, or not of its vocabulary.
        """
        if not prompts:
            return []
        samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else sampling
        if len(samplings) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(samplings)} samplings")
        self._check(prompts, samplings)

        rows, tokens, chunk, num_chunks = self._batch(prompts, samplings)
        stops = np.full(bucket(len(stop_ids), smallest=4), NO_STOP, np.int32)
        stops[: len(stop_ids)] = stop_ids
        shape = (*tokens.shape, chunk, len(stops))
        args = (self.model, tokens, np.int32(num_chunks), rows, stops)
        state = self._run(("prefill", shape), functools.partial(prefill, chunk=chunk), (), *args)
        limit = np.int32(max(s.max_tokens for s in samplings))
        args = (self.model, state, rows, stops, limit)
        state = self._run(("decode", shape), decode, (1,), *args)
        output = multihost_utils.process_allgather(state.output, tiled=True)
        return [
            until_stop(row[: s.max_tokens].tolist(), stop_ids)
            for row, s in zip(output, samplings, strict=False)
        ]

    def _run(self, key: Any, program: Callable, donated: tuple[int, ...], *args: Any) -> Any:
        """Runs a program, compiled ahead: a shape or sharding that differs raises."""
        if key not in self._programs:
            lowered = jax.jit(program, donate_argnums=donated).lower(*args)
            self._programs[key] = lowered.compile()
        return self._programs[key](*args)

    def _check(self, prompts, samplings) -> None:
        config = self.model.config
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            if not len(prompt):
                raise UserError(f"prompt {i} has no tokens; give it at least one to go on from")
            if min(prompt) < 0 or max(prompt) >= config.vocab_size:
                wrong = next(t for t in prompt if not 0 <= t < config.vocab_size)
                raise UserError(
                    f"prompt {i} has token {wrong} and model.vocab_size={config.vocab_size}; "
                    "use the tokenizer that the model was trained with"
                )
            room = config.max_seq_len - len(prompt)
            if sampling.max_tokens > room:
                way = f"use max_tokens={room}" if room > 0 else "shorten the prompt"
                raise UserError(
                    f"prompt {i} has {len(prompt)} tokens, which with max_tokens="
                    f"{sampling.max_tokens} is more than model.max_seq_len={config.max_seq_len}; "
                    f"{way}"
                )

    def _batch(self, prompts, samplings) -> tuple[Rows, jax.Array, int, int]:
        """Returns the rows, their tokens [B, S] padded on the left, and how to cut them."""
        longest = max(len(prompt) for prompt in prompts)
        chunk = min(bucket(longest), CHUNK_TOKENS)
        num_chunks = -(-longest // chunk)
        slots = bucket(num_chunks * chunk + max(s.max_tokens for s in samplings))
        batch = self._batch_size(len(prompts))
        tokens = np.zeros((batch, slots), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[num_chunks * chunk - len(prompt) : num_chunks * chunk] = prompt
        rules = self.model.rules.here()
        spec = rules("batch")

        def column(values, dtype, fill=0):
            values = [*values, *[fill] * (batch - len(prompts))]
            return jax.device_put(np.asarray(values, dtype), spec)

        rows = Rows(
            lengths=column((len(prompt) for prompt in prompts), np.int32),
            budget=column((s.max_tokens for s in samplings), np.int32),
            seeds=column((s.seed for s in samplings), np.uint32),
            temperature=column((s.temperature for s in samplings), np.float32),
            top_k=column((s.top_k for s in samplings), np.int32),
            top_p=column((s.top_p for s in samplings), np.float32, fill=1),
        )
        return rows, jax.device_put(tokens, rules("batch", None)), chunk, num_chunks

    def _batch_size(self, num_prompts: int) -> int:
        shards = self.model.rules.shards("batch", jax.sharding.get_mesh())
        per_shard = -(-num_prompts // shards)
        # XLA's CPU product of one bf16 row runs at a tenth of the speed of two.
        if mesh_device().platform == "cpu" and self.model.dtype == jnp.bfloat16:
            per_shard = max(per_shard, 2)
        return shards * (1 << (per_shard - 1).bit_length())


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig | Sequence[SamplingConfig],
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Generates once, see `Generator`; keep one of those instead if there is more to generate."""
    return Generator(model)(prompts, sampling, stop_ids)


def generate_text(
    model: Decoder | Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig | Sequence[SamplingConfig],
    stop_ids: Sequence[int] = (),
    *,
    chat: bool = False,
) -> list[str]:
    """Returns the text that follows each prompt, up to a stop id or the tokenizer's end of text.

    With `chat` a prompt is a user's message and the text an answer, by the model's chat template.

    Raises:
        UserError: as `Generator`, or the tokenizer has tokens that the model has not, or no chat
            template.
    """
    generator = model if isinstance(model, Generator) else Generator(model)
    check_vocab(tokenizer, generator.model.config.vocab_size)
    if chat:
        ids = [
            encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts
        ]
    else:
        ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    stops = list(dict.fromkeys([*stop_ids, tokenizer.eos_id]))
    return [tokenizer.decode(row) for row in generator(ids, sampling, stops)]


def bucket(size: int, smallest: int = SMALLEST_BUCKET) -> int:
    """Returns the next of 16, 24, 32, 48, 64, 96, ...: at most a third is padding."""
    power = smallest
    while power < size:
        power *= 2
    return power * 3 // 4 if smallest < power and size <= power * 3 // 4 else power


def until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Returns the tokens before the first stop id."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stop_ids), None)]


def for_serving(model: Decoder, dtype: Dtype | None = None) -> Decoder:
    """Returns a copy of a model for decoding; call it inside the mesh.

    - Layers are a list: a scan copies every layer's weights and its cache for every token. This
      holds on a TPU too, where the cache would be written twice; a longer compilation is the price.
    - Weights are in the compute dtype once and for all, which is the model's own, except float32 on
      CPU, where products of a few bf16 rows are slow.
    - Weights are whole over `fsdp` if that takes less than half of a device's memory: they are read
      for every token, and gathering them would take far longer than reading. Otherwise they stay
      split, and each layer is gathered when it runs.

    Raises:
        UserError: the mesh has stages, or splits sequences; decoding has one token at a time.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    for axis in ("pipeline", "context"):
        if sizes.get(axis, 1) > 1:
            raise UserError(
                f"mesh.{axis}={sizes[axis]} cannot generate; tokens come one at a time, so use "
                f"mesh.{axis}=1 and split over mesh.tensor or mesh.fsdp"
            )
    if dtype is None:
        dtype = "float32" if mesh_device().platform == "cpu" else model.compute.dtype
    # One token at a time leaves no positions to split the residual stream over.
    rules = dataclasses.replace(model.rules, act_seq=model.rules.seq)
    if _fits(model, dtype):
        rules = dataclasses.replace(rules, embed=None, expert_embed=None)
    compute = dataclasses.replace(model.compute, dtype=dtype)
    make = functools.partial(Decoder, model.config, compute=compute, rules=rules)
    shape = jax.eval_shape(lambda: make(key=jax.random.key(0)).unstacked())

    def convert(param: nnx.Param) -> nnx.Param:
        value = param[...]
        if not isinstance(param, Elementwise):
            value = value if isinstance(param, Precise) else value.astype(dtype)
            value = reshard(value, rules.here()(*param.axes))
        return type(param)(value, axes=param.axes)

    def leaves(model: Decoder) -> list[jax.Array]:
        return jax.tree.leaves(jax.tree.map(convert, model.unstacked(), is_leaf=_is_param))

    return jax.tree.unflatten(jax.tree.structure(shape), jax.jit(leaves)(model))


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param)


def _fits(model: Decoder, dtype: Dtype) -> bool:
    """Whether a device can hold its weights whole over `fsdp`, and as much again."""
    device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", float("inf"))
    mesh = jax.sharding.get_mesh()
    rules = dataclasses.replace(model.rules, embed=None, expert_embed=None)

    def held(param: nnx.Param) -> float:
        return param[...].size / math.prod(rules.shards(axis, mesh) for axis in param.axes if axis)

    weights = sum(map(held, jax.tree.leaves(model, is_leaf=_is_param)))
    return weights * jnp.dtype(dtype).itemsize < memory / 2
