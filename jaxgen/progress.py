"""A progress bar on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Shows how far something is, on standard error and only if that is a terminal.

    Args:
        what: is being done.
        total: amount of it.
        in_bytes: whether the amounts are shown, as bytes.

    Yields:
        What to call with the amount that is done.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    import rich.console
    import rich.progress

    columns = [*rich.progress.Progress.get_default_columns()]
    if in_bytes:
        columns.append(rich.progress.DownloadColumn())
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda done: bars.update(bar, completed=done)
