"""A model as the Language Model Evaluation Harness calls it; needs the extra `lm-eval`.

    lm_eval.simple_evaluate(model=JaxgenLM.from_model("runs/tiny"), tasks=["hellaswag"])
    python -m jaxgen.eval.harness --model jaxgen --model_args pretrained=runs/tiny --tasks hellaswag

The second is lm-eval's own command, with this model in its registry.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from jaxgen import fields
from jaxgen.data.chat import render, template_of
from jaxgen.data.tokenizer import Tokenizer, check_vocab
from jaxgen.errors import UserError
from jaxgen.eval.score import Scorer, encode_pair, encode_text, prefix_token
from jaxgen.fit import fitting_mesh
from jaxgen.models.decoder import Decoder
from jaxgen.pretrained import load_model, open_model
from jaxgen.serve.generate import Generator
from jaxgen.serve.request import SamplingConfig
from jaxgen.serve.weights import Dtype

# An answer is looked at for where it ends after so many tokens; then its prompt is read again.
BURST_TOKENS = 64
# What tasks call the most tokens of an answer; the first counts. The default is lm-eval's.
MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_MAX_TOKENS = 256


@register_model("jaxgen")
class JaxgenLM(LM):
    """Scores what tasks ask for on any mesh, and writes it on those that generate.

    Numbers are those of lm-eval's `hf` model of the same weights, which cuts and begins texts in
    the same way: contexts are cut on the left, and a text begins as its tokenizer says.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        *,
        stop_ids: Sequence[int] = (),
        batch_size: int | None = None,
        dtype: Dtype | None = None,
    ):
        """Makes it from a model on a mesh.

        Args:
            model: on `mesh`.
            tokenizer: its own.
            mesh: where it runs.
            stop_ids: tokens that end an answer, besides the end of text.
            batch_size: as for `Scorer`; and the answers written at once, by default 16.
            dtype: as for `Scorer` and `Generator`.
        """
        super().__init__()
        check_vocab(tokenizer, model.config.vocab_size)
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        self.stop_ids = tuple(dict.fromkeys([*stop_ids, tokenizer.eos_id]))
        self.batch_size, self.dtype = batch_size or 16, dtype
        with jax.set_mesh(mesh):
            self.scorer = Scorer(model, batch_size=batch_size, dtype=dtype)
        self._generator: Generator | None = None

    @classmethod
    def from_model(
        cls,
        location: str | os.PathLike,
        overrides: Mapping[str, Any] | None = None,
        *,
        batch_size: int | None = None,
    ) -> "JaxgenLM":
        """Reads a MODEL, as `jaxgen eval` does.

        Args:
            location: a run directory, a checkpoint of one, or a Hugging Face folder.
            overrides: fields of `ServeConfig`, such as {"mesh.tensor": 2}.
            batch_size: as for `JaxgenLM`.

        Raises:
            UserError: there is no model, or it does not fit the mesh.
        """
        texts = {name: str(value) for name, value in (overrides or {}).items()}
        pretrained = open_model(location)
        config = fields.override(pretrained.serve_config(), texts)
        mesh = fitting_mesh(config)
        model, tokenizer = load_model(pretrained, config, mesh)
        return cls(
            model,
            tokenizer,
            mesh,
            stop_ids=pretrained.generation.stop_ids,
            batch_size=batch_size,
            dtype=config.compute.dtype if "compute.dtype" in texts else None,
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "JaxgenLM":
        """Reads a MODEL as lm-eval names it: `pretrained=runs/tiny,mesh.tensor=2`."""
        given = {**arg_dict, **{k: v for k, v in (additional_config or {}).items() if v}}
        location, batch_size = given.pop("pretrained", None), given.pop("batch_size", None)
        given.pop("max_batch_size", None)
        if location is None:
            raise UserError("model_args has no pretrained; use pretrained=runs/tiny")
        if given.pop("device", None) is not None:
            raise UserError(
                "device is not for lm-eval to choose; set JAX_PLATFORMS, or mesh.data=1"
            )
        size = None if batch_size in (None, "auto") else int(batch_size)
        return cls.from_model(location, given, batch_size=size)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "JaxgenLM":
        """Reads a MODEL as lm-eval's command line names it."""
        pairs = [pair.partition("=") for pair in arg_string.split(",") if pair]
        return cls.create_from_arg_obj({k: v for k, _, v in pairs}, additional_config)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is the greedy one."""
        pairs = [request.args for request in requests]
        with jax.set_mesh(self.mesh):
            scores = self.scorer([encode_pair(self.tokenizer, *pair) for pair in pairs])
        for pair, score in zip(pairs, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, score)
        return list(scores)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of each whole text.

        As lm-eval has it, a begin of text that the tokenizer puts there is scored too, after
        another one; `jaxgen eval` does not.
        """
        texts = [request.args[0] for request in requests]
        ids = [encode_text(self.tokenizer, text) for text in texts]
        with jax.set_mesh(self.mesh):
            logliks = self.scorer.rolling(ids, prefix_token(self.tokenizer))
        for text, loglik in zip(texts, logliks, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), loglik)
        return logliks

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each context, up to the first of its `until` texts.

        Contexts are cut on the left, to what leaves room for the answer.

        Raises:
            UserError: a task sets something else than `until`, the number of tokens, `do_sample`,
                `temperature`, `top_k` and `top_p`; or there is no room for a context.
        """
        asked = [_asked(request.args[1], number) for number, request in enumerate(requests)]
        prompts = []
        for request, (sampling, _) in zip(requests, asked, strict=True):
            room = self.model.config.max_seq_len - sampling.max_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks={sampling.max_tokens} leaves no room for a context in "
                    f"model.max_seq_len={self.model.config.max_seq_len}; lower it"
                )
            prompts.append(encode_text(self.tokenizer, request.args[0])[-room:])
        order = sorted(range(len(asked)), key=lambda number: -len(prompts[number]))
        answers: dict[int, str] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            texts = self._generate([prompts[n] for n in chosen], [asked[n] for n in chosen])
            answers |= zip(chosen, texts, strict=True)
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[number])
        return [answers[number] for number in range(len(asked))]

    def _generate(self, prompts: list[list[int]], asked: list["_Asked"]) -> list[str]:
        if self._generator is None:
            with jax.set_mesh(self.mesh):
                self._generator = Generator(self.model, dtype=self.dtype)
        answers: list[list[int]] = [[] for _ in prompts]
        texts, going = [""] * len(prompts), list(range(len(prompts)))
        while going:
            # A draw depends on its place and seed, so bursts give the tokens of one go.
            samplings = []
            for row in going:
                left = asked[row].sampling.max_tokens - len(answers[row])
                most = min(left, BURST_TOKENS)
                samplings.append(dataclasses.replace(asked[row].sampling, max_tokens=most))
            with jax.set_mesh(self.mesh):
                contexts = [prompts[row] + answers[row] for row in going]
                bursts = self._generator(contexts, samplings, self.stop_ids)
            unfinished = []
            for row, sampling, tokens in zip(going, samplings, bursts, strict=True):
                answers[row] += tokens
                text = self.tokenizer.decode(answers[row])
                ends = [text.find(until) for until in asked[row].untils if until in text]
                texts[row] = text[: min(ends, default=None)]
                met_stop_id = len(tokens) < sampling.max_tokens
                at_most = len(answers[row]) == asked[row].sampling.max_tokens
                if not (ends or met_stop_id or at_most):
                    unfinished.append(row)
            going = unfinished
        return texts

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches of requests call the tokenizer and its template."""
        return self.tokenizer.fingerprint[:16]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template that tasks are rendered by, or None without one.

        Raises:
            UserError: it is asked for by name, or there is none.
        """
        if isinstance(chat_template, str):
            raise UserError(
                f"apply_chat_template={chat_template!r}; use True: there is one template"
            )
        return template_of(self.tokenizer) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as text; without the prompt, its last message can go on."""
        text = render(
            template_of(self.tokenizer),
            chat_history,
            tokenizer=self.tokenizer,
            add_generation_prompt=add_generation_prompt,
        )
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        if last not in text:
            raise UserError("the chat template changes messages, so that none can be gone on from")
        return text[: text.rindex(last) + len(last)]


class _Asked(NamedTuple):
    """How an answer is drawn, and the texts that end it."""

    sampling: SamplingConfig
    untils: list[str]


def _asked(gen_kwargs: Mapping[str, Any], seed: int) -> _Asked:
    """Returns what a task's generation_kwargs ask for."""
    given = dict(gen_kwargs)
    until = given.pop("until", None) or []
    untils = [u for u in ([until] if isinstance(until, str) else until) if u]
    lengths = [given.pop(name, None) for name in MAX_TOKENS]
    length = next((int(n) for n in lengths if n is not None), DEFAULT_MAX_TOKENS)
    chosen = {name: given.pop(name, None) for name in ("temperature", "top_k", "top_p")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    # As in lm-eval: greedy unless there is a temperature, or where sampling is switched off.
    if given.pop("do_sample", None) is False:
        chosen = {}
    if given:
        raise UserError(
            f"generation_kwargs has {', '.join(given)}, which cannot be honoured; use until, "
            f"do_sample, temperature, top_k, top_p, {', '.join(MAX_TOKENS)}"
        )
    return _Asked(SamplingConfig(max_tokens=length, seed=seed, **chosen), untils)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
