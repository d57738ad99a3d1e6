"""How a check ends: right, wrong or refused, and why; of many, a table."""

import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxgen.errors import UserError

WRONG, REFUSED = "WRONG", "refused"


class Section(NamedTuple):
    """One table, whose rows are made when they are asked for."""

    title: str
    header: tuple[str, ...]
    rows: Iterator[tuple[str, ...]]
    """The last text of each is its verdict: ok, WRONG or refused, and why."""


def judge(num: int, check: Callable[..., tuple[list[str], str]], *args: Any) -> tuple[str, ...]:
    """The `num` texts and the verdict of a check; one that raises gives its reason instead."""
    try:
        texts, verdict = check(*args)
    except UserError as refusal:
        texts, verdict = ["-"] * num, f"{REFUSED}: {refusal}"
    except Exception as error:  # Whatever it is, the next check may say more about it.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        texts, verdict = ["-"] * num, f"{WRONG}: {textwrap.shorten(reason, 300)}"
    return *texts, verdict


def relative_error(got: Any, expected: Any) -> float:
    """Norm of the difference over the norm."""
    expected = np.asarray(expected, np.float64)
    norm = np.linalg.norm(expected)
    # Of what is zero, such as the gradient of a router's bias, the norm itself.
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / (norm or 1.0))
