"""The options of the subcommands: how each is given, and what its help says."""

from typing import Any

CONFIG = "CONFIG"
MODEL = "MODEL"
FILE = "FILE"
DIR = "DIR"


def _number(metavar: str, text: str, default: int | float) -> dict[str, Any]:
    help = f"{text} (default: {default})"
    return {"type": type(default), "default": default, "metavar": metavar, "help": help}


def _sampling(metavar: str, text: str, default: int | float) -> dict[str, Any]:
    help = f"{text} (default: as the model's generation_config.json says, else {default})"
    return {"type": type(default), "metavar": metavar, "help": help}


def _lengths(text: str, default: int) -> dict[str, Any]:
    help = (
        f"tokens {text}: N, LOW:HIGH for uniform lengths, or lognormal:MEDIAN:SIGMA:HIGH "
        f"(default: {default})"
    )
    return {"default": str(default), "metavar": "LENGTHS", "help": help}


def _limit(text: str) -> dict[str, Any]:
    help = f"an answer counts as goodput if in so many seconds {text} (default: no limit)"
    return {"type": float, "metavar": "SECONDS", "help": help}


OPTIONS: dict[str, dict[str, Any]] = {
    CONFIG: {
        "metavar": "CONFIG.py[:name]",
        "help": "a Python file and the config in it (name: config); try configs/tiny.py",
    },
    MODEL: {
        "metavar": "MODEL",
        "help": "a run directory such as runs/tiny, a checkpoint of one, or a Hugging Face folder",
    },
    FILE: {"metavar": "FILE", "help": "a GGUF file on this machine"},
    DIR: {"metavar": "DIR", "help": "the folder to write, new or empty"},
    "--devices": {"type": int, "metavar": "N", "help": "simulate N CPU devices"},
    "--run-dir": {
        "metavar": "DIR",
        "help": "where the run lives (default: runs/NAME); the same command again resumes it",
    },
    "--prompt": {
        "action": "extend",
        "nargs": "+",
        "metavar": "TEXT",
        "help": "texts to continue, together in one batch (default: standard input)",
    },
    "--chat": {
        "action": "store_true",
        "help": "each prompt is a user's message; the model's chat template makes a text of it",
    },
    "--max-tokens": _number("N", "most new tokens per prompt", 128),
    "--min-tokens": _number("N", "fewest new tokens per prompt", 0),
    "--temperature": _sampling("T", "divides the logits; 0 takes the likeliest token", 0.0),
    "--top-k": _sampling("K", "sample among the K likeliest tokens; 0 for all", 0),
    "--top-p": _sampling("P", "sample among the likeliest tokens that sum to probability P", 1.0),
    "--min-p": _sampling("P", "sample among tokens P times as likely as the likeliest", 0.0),
    "--presence-penalty": _number("X", "taken off the logits of tokens that the text got", 0.0),
    "--frequency-penalty": _number("X", "likewise, as often as it got them", 0.0),
    "--repetition-penalty": _sampling("X", "divides the logits of all tokens of the text", 1.0),
    "--data": {
        "metavar": "FILE.jsonl",
        "help": "at any location: questions with choices, or texts; one JSON object a line",
    },
    "--limit": {"type": int, "metavar": "N", "help": "take the first N of them (default: all)"},
    "--batch-size": {
        "type": int,
        "metavar": "N",
        "help": "rows scored at once (default: by their length)",
    },
    "--seed": _number("S", "of draws; of sampling, each prompt after the first adds 1", 0),
    "--step": _number("N", "the step whose batch is shown, as in metrics.jsonl: the first is 1", 1),
    "--steps": _number("N", "training steps that are timed, after two that are not", 20),
    "--json": {"action": "store_true", "help": "print one JSON object"},
    "--min-bytes": _number("B", "the first size", 2**16),
    "--max-bytes": {
        "type": int,
        "metavar": "B",
        "help": "the last size, by factors of 4 (default: 67108864, on CPU 4194304)",
    },
    "--dtype": {
        "choices": ("bfloat16", "float16", "float32"),
        "help": "of the numbers (default: of collectives bfloat16, of a model as it is stored, "
        "of a GGUF file float32)",
    },
    "--adapter": {
        "action": "store_true",
        "help": "write what a run with lora has trained as an adapter for peft, not merged",
    },
    "--host": {
        "default": "127.0.0.1",
        "metavar": "ADDRESS",
        "help": "where to listen; 0.0.0.0 for all that reach this machine (default: 127.0.0.1)",
    },
    "--port": _number("P", "where to listen; 0 for any that is free", 8000),
    "--name": {"metavar": "NAME", "help": "of the model in requests (default: MODEL's last part)"},
    "--api-key-file": {
        "action": "append",
        "metavar": "FILE",
        "help": "API keys, one a line, of which requests must bring one; so is JAXGEN_API_KEY "
        "(default: whoever reaches the server may ask)",
    },
    "--input": {
        "metavar": "FILE.jsonl",
        "help": "at any location: objects with a prompt, or the messages of a chat, and of the "
        "sampling parameters those that are the line's own",
    },
    "--output": {
        "metavar": "FILE.jsonl",
        "help": "of --input: a new file at any location, with an answer for each line",
    },
    "--url": {"metavar": "URL", "help": "an OpenAI-compatible server (default: one of MODEL)"},
    "--concurrency": {
        "type": int,
        "metavar": "N",
        "help": "closed load: N clients that each wait for their answer (default: 16)",
    },
    "--rate": {
        "type": float,
        "metavar": "R",
        "help": "open load: R requests a second by a Poisson process, which wait for no answer",
    },
    "--num-requests": _number("N", "requests that count", 100),
    "--warmup": _number("N", "requests before them, which do not", 4),
    "--input-tokens": _lengths("of prompts", 128),
    "--output-tokens": _lengths("of answers", 64),
    "--shared-prefix": _number("N", "tokens that all prompts begin with, besides their own", 0),
    "--vocab-size": {
        "type": int,
        "metavar": "N",
        "help": "prompts are of random tokens below it (default: that of MODEL, of a --url 256)",
    },
    "--max-ttft": _limit("its first text came, counted from when it was due"),
    "--max-tpot": _limit("each later token took on average"),
    "--draft": {
        "metavar": "MODEL",
        "help": "a smaller model of the same vocabulary, whose guesses MODEL verifies several at a "
        "time; answers stay the same",
    },
    "--admin-key-file": {
        "action": "append",
        "metavar": "FILE",
        "help": "keys, one a line, with which the weights may be replaced by POST /admin/reload; "
        "so is JAXGEN_ADMIN_KEY (default: nobody may)",
    },
    "--iterations": _number("N", "timed runs of each, of which the median counts", 10),
}
