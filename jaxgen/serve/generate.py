"""Text from a decoder, for any number of prompts of any lengths."""

from collections.abc import Sequence

from jaxgen.data.chat import encode_prompt
from jaxgen.data.tokenizer import Tokenizer, check_vocab
from jaxgen.models.decoder import Decoder
from jaxgen.progress import progress
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.core import EngineCore
from jaxgen.serve.request import Constraint, Request, SamplingConfig
from jaxgen.serve.weights import Dtype

# Prompts answered at once; more take their turns.
MAX_NUM_SEQS = 64


class Generator:
    """Generates from one model; keeps the programs that it compiles, and prefixes it has read.

    Use it inside the `jax.set_mesh(mesh)` of the model. Of several processes, all call it alike.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        dtype: Dtype | None = None,
        config: EngineConfig | None = None,
        draft: Decoder | None = None,
        donate: bool = False,
    ):
        """Makes copies of the model, and of a draft model, for decoding; see `for_serving`."""
        config = config or EngineConfig(max_num_seqs=MAX_NUM_SEQS)
        self.core = EngineCore(model, config, dtype, draft, donate=donate)
        self.model = self.core.runner.model

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig],
        stop_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """Returns the tokens that follow each prompt, without the stop id that ended them.

        As `answer`, of which this is the output.
        """
        return [request.output for request in self.answer(prompts, sampling, stop_ids)]

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig],
        stop_ids: Sequence[int] = (),
        constraints: Sequence[Constraint | None] | None = None,
    ) -> list[Request]:
        """Returns what has come of each prompt: tokens, log-probabilities, why it ended.

        Args:
            prompts: token ids, each at least one.
            sampling: for all prompts, or one for each.
            stop_ids: tokens that end a text.
            constraints: one for each prompt, or None.

        Raises:
            UserError: a prompt is empty, too long for the model, or not of its vocabulary.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else sampling
        if len(samplings) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(samplings)} samplings")
        constraints = [None] * len(prompts) if constraints is None else constraints
        requests = []
        all = zip(prompts, samplings, constraints, strict=True)
        for i, (prompt, each, constraint) in enumerate(all):
            ids = self.core.check(f"prompt {i}", prompt, each)
            requests.append(Request(ids, each, frozenset(stop_ids), constraint=constraint))
        if requests:
            self.core.runner.compile_for(len(requests))
            with progress("generating", len(requests), in_bytes=False) as show:
                self.core.run(requests, show)
        return requests


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig | Sequence[SamplingConfig],
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Generates once, see `Generator`; keep one of those instead if there is more to generate."""
    return _for_so_many(model, len(prompts))(prompts, sampling, stop_ids)


def generate_text(
    model: Decoder | Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig | Sequence[SamplingConfig],
    stop_ids: Sequence[int] = (),
    *,
    chat: bool = False,
    draft: Decoder | None = None,
    donate: bool = False,
) -> list[str]:
    """Returns the text that follows each prompt, up to a stop id or the tokenizer's end of text.

    With `chat` a prompt is a user's message and the text an answer, by the model's chat template.
    A `draft` model makes it faster, where it is right often enough; a `Generator` has its own.
    With `donate` models are freed as they are copied, and of no use any more.

    Raises:
        UserError: as `Generator`, or the tokenizer has tokens that the model has not, or no chat
            template.
    """
    generator = (
        model
        if isinstance(model, Generator)
        else _for_so_many(model, len(prompts), draft=draft, donate=donate)
    )
    check_vocab(tokenizer, generator.model.config.vocab_size)
    if chat:
        ids = [
            encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts
        ]
    else:
        ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    stops = list(dict.fromkeys([*stop_ids, tokenizer.eos_id]))
    return [tokenizer.decode(row) for row in generator(ids, sampling, stops)]


def _for_so_many(
    model: Decoder, num_prompts: int, *, draft: Decoder | None = None, donate: bool = False
) -> Generator:
    """Returns a generator whose cache has room for so many prompts and not for more."""
    slots = min(max(num_prompts, 1), MAX_NUM_SEQS)
    speculation = "off" if draft is None else "draft"
    config = EngineConfig(max_num_seqs=slots, speculation=speculation)
    return Generator(model, config=config, draft=draft, donate=donate)
