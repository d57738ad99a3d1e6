"""An engine whose model repeats the prompt: the real scheduler and blocks, and no device."""

import threading
import time

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.serve.backend import Stats
from jaxgen.serve.blocks import Blocks
from jaxgen.serve.request import SamplingConfig
from jaxgen.serve.schema import Served
from jaxgen.serve.scheduler import Scheduler

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class EchoEngine:
    """After the prompt comes the prompt, rotated by the seed unless it is greedy, and its end."""

    def __init__(self, *, eos, step_s=0.0, slots=8, blocks=512, queue=32):
        self.eos, self.step_s = eos, step_s
        self.pool = Blocks(blocks, 16)
        self.scheduler = Scheduler(
            [self.pool],
            slots_per_shard=slots,
            chunk=256,
            burst=4,
            max_queued_requests=queue,
            max_queued_tokens=100_000,
        )
        self.deliver, self.made, self.moved = {}, 0, time.monotonic()
        self.changed, self.closed, self.broken = threading.Condition(), False, None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def submit(self, request, deliver):
        with self.changed:
            self.scheduler.submit(request)
            self.deliver[request] = deliver
            self.changed.notify()

    def cancel(self, request):
        with self.changed:
            self.scheduler.cancel(request)
            self.deliver.pop(request, None)

    def stats(self):
        scheduler = self.scheduler
        return Stats(
            waiting=scheduler.num_waiting,
            running=len(scheduler.rows),
            blocks_used=self.pool.used,
            blocks=self.pool.num_blocks - 1,
            block_size=16,
            tokens_generated=self.made,
            prompt_tokens=scheduler.prompt_tokens,
            prompt_tokens_found=scheduler.prompt_tokens_found,
            preemptions=scheduler.preemptions,
            recompiles=0,
            still_s=0.0 if scheduler.idle else time.monotonic() - self.moved,
        )

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _run(self):
        while True:
            with self.changed:
                while self.scheduler.idle and not self.closed:
                    self.changed.wait()
                if self.closed:
                    return
                if self.broken:
                    for deliver in self.deliver.values():
                        deliver([], self.broken)
                    return
                self._step()
                self.moved = time.monotonic()
            time.sleep(self.step_s)

    def _step(self):
        plan = self.scheduler.plan()
        rows = [(chunk.row, 1) for chunks in plan.rounds for chunk in chunks if chunk.last]
        for row, count in [*rows, *((row, plan.steps) for row in plan.rows)]:
            request = row.request
            have = len(request.output)
            tokens = [self.next_token(request, have + i) for i in range(count)]
            taken = self.scheduler.deliver(row, tokens, asked=count)
            self.made += len(taken)
            self.deliver[request](taken, request.finish_reason)
            if request.finish_reason:
                del self.deliver[request]

    def next_token(self, request, at):
        size = len(request.prompt)
        if at % (size + 1) == size:
            return self.eos
        shift = request.sampling.seed if request.sampling.temperature else 0
        return request.prompt[(at + shift) % size]


def served(**changes):
    tokenizer = Tokenizer.from_bytes()
    # Without a begin of text, so that the echo of a text is that text.
    model = tokenizer._special
    tokenizer = Tokenizer(model, bos=None, eos="<|end_of_text|>", pad=None, chat_template=TEMPLATE)
    values = {
        "name": "echo",
        "tokenizer": tokenizer,
        "vocab_size": 258,
        "max_seq_len": 4096,
        "stop_ids": frozenset([tokenizer.eos_id]),
        "defaults": SamplingConfig(temperature=1.0),
        "max_requests": 32,
    }
    return Served(**(values | changes))
