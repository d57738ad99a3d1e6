"""The engine around a model of a few lines, which repeats the prompt: no device, no compilation."""

import threading
import time
import types
import weakref
from collections import deque

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.serve.blocks import Blocks
from jaxgen.serve.config import EngineConfig
from jaxgen.serve.core import EngineCore
from jaxgen.serve.engine import Engine
from jaxgen.serve.request import SamplingConfig, TokenLogprobs
from jaxgen.serve.roofline import DecodeMeter, StepCost
from jaxgen.serve.scheduler import Scheduler
from jaxgen.serve.schema import Served

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
EOS = 257
MAX_SEQ_LEN = 4096


class Echo:
    """Stands for the runner: after the prompt comes the prompt, rotated by the seed, and its end.

    A greedy answer is not rotated. What a constraint does not let in gives way to the lowest token
    that it does. Token n has the log-probability -n / 1000.
    """

    lattice = types.SimpleNamespace(compilations=0)

    def __init__(self, step_s):
        config = types.SimpleNamespace(vocab_size=258, max_seq_len=MAX_SEQ_LEN)
        self.model = types.SimpleNamespace(config=config)
        self.step_s, self.broken, self.next = step_s, None, weakref.WeakKeyDictionary()

    def dispatch(self, plan):
        if self.broken:
            raise self.broken
        rows = [(chunk.row, 1) for chunks in plan.rounds for chunk in chunks if chunk.last]
        rows += [(row, burst.steps) for burst in plan.bursts for row in burst.rows]
        return [
            self.run(row, steps, 0 if i else self.step_s) for i, (row, steps) in enumerate(rows)
        ]

    def run(self, row, steps, seconds):
        begun = len(row.tokens) - len(row.request.prompt)
        at = begun if steps == 1 and row not in self.next else self.next[row]
        self.next[row] = at + steps
        tokens = [token_of(row.request, at + i) for i in range(steps)]
        count = row.request.sampling.logprobs
        top = tuple((n, -n / 1000) for n in range(count or 0))
        logprobs = [TokenLogprobs(-n / 1000, top) for n in tokens] if count is not None else []

        def fetch():
            time.sleep(seconds)
            return [(row, tokens, logprobs)]

        constrained = row.request.constraint is not None
        counts = {
            "asked": steps,
            "promised": steps,
            "guessed": None,
            "begun_s": time.perf_counter(),
        }
        return types.SimpleNamespace(fetch=fetch, constrained=constrained, **counts)


def token_of(request, at):
    size, mask = len(request.prompt), request.mask
    shift = request.sampling.seed if request.sampling.temperature else 0
    token = EOS if at % (size + 1) == size else request.prompt[(at + shift) % size]
    if mask is None or mask[token // 32] >> token % 32 & 1:
        return token
    return next(n for n in range(EOS + 1) if mask[n // 32] >> n % 32 & 1)


class EchoCore(EngineCore):
    def __init__(self, config, step_s):
        self.config, self.runner = config, Echo(step_s)
        self.pools = [Blocks(config.kv_blocks + 1, config.block_size)]
        self.scheduler = Scheduler(
            self.pools,
            slots_per_shard=config.max_num_seqs,
            chunk=config.prefill_chunk,
            burst=config.burst,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
        )
        cost = StepCost(1, 0, 0.0, (None,), 1.0, 1.0, 1.0)
        self.meter = DecodeMeter(cost, shards=1, peak=None)
        self.tokens_generated = self.tokens_drafted = self.tokens_accepted = 0
        self.reloads = 0
        self.changed, self.cancelled = threading.Condition(), []
        self._flying = deque()


class EchoEngine(Engine):
    def __init__(self, tokenizer, *, step_s=0.0, slots=8, blocks=511, queue=32):
        config = EngineConfig(
            max_num_seqs=slots, kv_blocks=blocks, max_queued_requests=queue, burst=4
        )
        self._core, self._tokenizer = EchoCore(config, step_s), tokenizer
        self._begin("0")

    @property
    def idle(self):
        return self._core.scheduler.idle and not self._answers


def tokenizer():
    """Bytes, without a begin of text, so that the echo of a text is that text."""
    model = Tokenizer.from_bytes()._special
    return Tokenizer(model, bos=None, eos="<|end_of_text|>", pad=None, chat_template=TEMPLATE)


def served(**changes):
    values = {
        "name": "echo",
        "tokenizer": tokenizer(),
        "vocab_size": 258,
        "max_seq_len": MAX_SEQ_LEN,
        "stop_ids": (EOS,),
        "defaults": SamplingConfig(temperature=1.0),
        "max_requests": 32,
        "max_prompt_tokens": 16 * MAX_SEQ_LEN,
    }
    return Served(**(values | changes))
