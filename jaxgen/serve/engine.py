"""The engine: requests come from any thread, and one thread of its own runs the model."""

import threading
import time
import types
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax

from jaxgen.checkpoint.tree import mesh_of
from jaxgen.data.text_stream import TextStream
from jaxgen.data.tokenizer import Tokenizer, check_vocab
from jaxgen.errors import UserError
from jaxgen.models.decoder import Decoder
from jaxgen.pretrained import Pretrained, open_model
from jaxgen.progress import progress
from jaxgen.serve.answer import Answer, Deliver, Piece
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.core import EngineCore
from jaxgen.serve.reload import Reloaded, ReloadRunning, Source, check_tokenizer
from jaxgen.serve.request import Constraint, Request, SamplingConfig, integers
from jaxgen.serve.stats import EngineStats
from jaxgen.serve.weights import Dtype

_CLOSED = "the engine is closed; make another"
_NEEDS_TOKENIZER = "texts need a tokenizer; give the engine one, or give it token ids"


class Engine:
    """Serves one model: `submit` from any thread, or `generate` for many prompts at once.

        with Engine(model, tokenizer) as engine:
            sampling = SamplingConfig(max_tokens=64, temperature=0.7)
            for piece in engine.generate(["def f", "def g"], sampling):
                print(piece.text)

    All programs are compiled before it is made; then nothing is. Use it as a context manager, or
    close it.

    It runs on the mesh of the model: rows are spread over `data`, `fsdp` and `expert`, kv heads
    over `tensor`, the tokens of each row over `context`.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        dtype: Dtype | None = None,
        draft: Decoder | None = None,
        weight_version: str = "0",
        donate: bool = False,
    ):
        """Compiles everything and starts the thread.

        Args:
            model: of which a copy for decoding is made; see `for_serving`.
            tokenizer: for prompts and answers that are text; its end of text ends every answer.
            config: how many requests it serves at once, and how.
            dtype: of weights and cache; None for that of `for_serving`.
            draft: a smaller model of the same vocabulary on the same mesh, for
                `speculation="draft"`.
            weight_version: names the weights in what the engine says of itself.
            donate: whether the models are of no use any more: they are freed as they are copied.

        Raises:
            UserError: the mesh cannot serve, or is one of several processes, or there is none; the
                draft model does not suit the model.
        """
        if jax.process_count() > 1:
            raise UserError(
                f"an engine serves from one process and there are {jax.process_count()}, which "
                "would each see other requests first; use jaxgen.Generator, alike in all of them"
            )
        mesh = mesh_of(jax.tree.leaves(model)[0])
        if mesh is None:
            raise UserError("the model is on no mesh; make it inside jax.set_mesh(mesh)")
        self._tokenizer = tokenizer
        if tokenizer is not None:
            check_vocab(tokenizer, model.config.vocab_size)
        with jax.set_mesh(mesh):
            self._core = EngineCore(model, config or EngineConfig(), dtype, draft, donate=donate)
            self._core.runner.compile_all()
        self._begin(weight_version)

    def _begin(self, weight_version: str) -> None:
        self.weight_version = weight_version
        self._reloading = threading.Lock()
        self._staged: tuple[list[jax.Array], str, Future[float]] | None = None
        self._compiled = self._core.runner.lattice.compilations
        self._answers: dict[Request, Answer] = {}
        self._closing = False
        self._error: BaseException | None = None
        self._moved = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingConfig | None = None,
        *,
        stop_ids: Sequence[int] = (),
        stop: str | Sequence[str] = (),
        priority: int = 0,
        ignore_eos: bool = False,
        constraint: Constraint | None = None,
        shown: Mapping[int, str] = types.MappingProxyType({}),
        bounded: bool = True,
        deliver: Deliver | None = None,
    ) -> Answer:
        """Takes a request and returns its answer, which is yet to come.

        Args:
            prompt: text, or token ids.
            sampling: how tokens are chosen.
            stop_ids: tokens that end the answer, besides the tokenizer's end of text.
            stop: a text, or texts, that end the answer and are no part of it.
            priority: lower numbers go first.
            ignore_eos: whether the tokenizer's end of text does not end the answer.
            constraint: what the answer may be; this request alone may use it.
            shown: special tokens that the answer's text has, by name; the others are left out.
            bounded: whether it is refused where too many wait.
            deliver: called in the engine's thread with what else waits to be iterated over; it
                must return at once.

        Raises:
            QueueFull: too many wait already.
            UserError: the model cannot answer this, or the engine is closed.
        """
        core, stream, sampling = self._core, None, sampling or SamplingConfig()
        ids = core.check("the prompt", self._encode(prompt), sampling)
        stops, (priority,) = set(integers("stop_ids", stop_ids)), integers("priority", [priority])
        # Not of the vocabulary: a model's own config may name some that it has not.
        if wrong := [token for token in stops if not 0 <= token < 2**31]:
            raise UserError(f"stop_ids has {wrong[0]}; give ids of tokens")
        stop = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(text, str) for text in stop):
            raise UserError(f"stop={stop}; give a text, or a list of texts")
        if self._tokenizer is not None:
            stops |= set() if ignore_eos else {self._tokenizer.eos_id}
            stream = TextStream(self._tokenizer, shown)
        elif stop:
            raise UserError(_NEEDS_TOKENIZER)
        request = Request(ids, sampling, frozenset(stops), priority, constraint)
        answer = Answer(core, request, stream, stop, deliver)
        with core.changed:
            self._check_open()
            if core.scheduler.idle:
                self._moved = time.monotonic()
            core.submit(request, bounded=bounded)
            self._answers[request] = answer
        return answer

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        stop_ids: Sequence[int] = (),
        stop: str | Sequence[str] = (),
    ) -> list[Piece]:
        """Answers all prompts and returns when the last is done; any number may be given.

        Args:
            prompts: texts, or token ids; one text is a list of one.
            sampling: for all prompts, or one for each.
            stop_ids: tokens that end an answer, besides the tokenizer's end of text.
            stop: a text, or texts, that end an answer and are no part of it.

        Raises:
            UserError: the model cannot answer one of them.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if sampling is None or isinstance(sampling, SamplingConfig):
            sampling = [sampling or SamplingConfig()] * len(prompts)
        answers, pairs = [], zip(map(self._encode, prompts), sampling, strict=True)
        tokens = [self._core.check(f"prompt {i}", *pair) for i, pair in enumerate(pairs)]
        try:
            for prompt, each in zip(tokens, sampling, strict=True):
                answer = self.submit(prompt, each, stop_ids=stop_ids, stop=stop, bounded=False)
                answers.append(answer)
            results = []
            with progress("generating", len(answers), in_bytes=False) as show:
                for answer in answers:
                    results.append(answer.result())
                    show(len(results))
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        return results

    def reload(
        self, source: Source, *, version: str | None = None, draft: Source | None = None
    ) -> Reloaded:
        """Goes on with other weights of the same model, and returns when they serve.

        Requests wait meanwhile and none is lost; nothing is compiled. An answer that has begun goes
        on where it is: its next token is what the new weights make of all text before it. They are
        read and converted in the calling thread while the old ones serve, and replace those array
        by array. If anything is wrong with them, the old ones stay.

        Args:
            source: a model, or where one is: a run directory, a checkpoint, a Hugging Face folder.
            version: names the weights; None for the fingerprint of the files, or for a model the
                number of reloads.
            draft: likewise, of the draft model; None if its weights stay: answers are the same,
                but fewer drafts may stand.

        Raises:
            ReloadRunning: another one is.
            UserError: they are not there, damaged, not finite, or of another model; or there is no
                draft model.
        """
        if not self._reloading.acquire(blocking=False):
            raise ReloadRunning("weights are being loaded already; try again when they are")
        try:
            began = time.monotonic()
            core, swapped = self._core, Future()
            if not isinstance(source, Decoder):
                source = source if isinstance(source, Pretrained) else open_model(source)
                check_tokenizer(source, self._tokenizer)
                version = version or source.fingerprint
            version, staged = version or str(core.reloads + 1), core.stage(source, draft)
            read_s = time.monotonic() - began
            with core.changed:
                self._check_open()
                self._staged = staged, version, swapped
                core.changed.notify_all()
            return Reloaded(version, read_s, swapped.result())
        finally:
            self._reloading.release()

    def stats(self) -> EngineStats:
        """Returns what the engine does now and has done."""
        core = self._core
        with core.changed:
            return EngineStats.of(core, self.weight_version, self._compiled)

    @property
    def config(self) -> EngineConfig:
        """How many requests it serves at once, and how."""
        return self._core.config

    @property
    def max_seq_len(self) -> int:
        """Tokens of a prompt and its answer at most: what the model takes and the cache holds."""
        pool, config = self._core.pools[0], self._core.runner.model.config
        return min(config.max_seq_len, (pool.num_blocks - 1) * pool.block_size)

    @property
    def still_s(self) -> float:
        """For how long it has had work and not done a step; infinite if it has failed.

        Waits for nothing, not even for an engine that does not move.
        """
        if self._error is not None:
            return float("inf")
        return 0.0 if self._core.scheduler.idle else time.monotonic() - self._moved

    def close(self) -> None:
        """Cancels what has not ended, and returns when the thread has."""
        with self._core.changed:
            self._closing = True
            self._core.changed.notify_all()
        self._thread.join()

    def _encode(self, prompt: Any) -> Any:
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise UserError(_NEEDS_TOKENIZER)
        return self._tokenizer.encode_prompt(prompt)

    def _check_open(self) -> None:
        if self._error is not None:
            raise UserError("the engine has failed; make another") from self._error
        if self._closing:
            raise UserError(_CLOSED)

    def _serve(self) -> None:
        try:
            while self._wait():
                if self._staged is not None:
                    self._swap(*self._staged)
                for request, tokens in self._core.step():
                    self._pass_on(request, tokens)
                self._sweep()
                self._move()
            self._sweep()
            if self._staged is not None:
                self._staged[2].set_exception(UserError(_CLOSED))
        except BaseException as error:
            self._fail(error)

    def _move(self) -> None:
        """Notes that the thread is well."""
        self._moved = time.monotonic()

    def _swap(self, staged: list[jax.Array], version: str, swapped: Future[float]) -> None:
        for request, tokens in self._core.land():
            self._pass_on(request, tokens)
        began = time.monotonic()
        self._core.replace(staged, self._move)
        self.weight_version, self._staged = version, None
        swapped.set_result(time.monotonic() - began)

    def _wait(self) -> bool:
        """Waits for something to do; returns whether to go on."""
        core = self._core
        with core.changed:
            while core.scheduler.idle and not (self._answers or self._staged or self._closing):
                core.changed.wait()
            if self._closing:
                for request in self._answers:
                    core.cancel(request)
            return not self._closing

    def _pass_on(self, request: Request, tokens: list[int]) -> None:
        answer = self._answers.get(request)
        if answer is not None and answer.take(tokens):
            del self._answers[request]

    def _sweep(self) -> None:
        """Ends the answers of requests that were cancelled."""
        core = self._core
        with core.changed:
            cancelled, core.cancelled = core.cancelled, []
        for request in cancelled:
            self._pass_on(request, [])

    def _fail(self, error: BaseException) -> None:
        with self._core.changed:
            self._error = error
            answers = list(self._answers.values())
            self._answers.clear()
        for answer in answers:
            answer.fail(error)
        if self._staged is not None:
            self._staged[2].set_exception(error)
