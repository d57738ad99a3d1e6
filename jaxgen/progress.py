"""A progress bar on a terminal's standard error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int, *, is_bytes: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields what is called with how much is done so far; without a terminal it does nothing."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    import rich.console
    import rich.progress

    amount = rich.progress.DownloadColumn() if is_bytes else rich.progress.MofNCompleteColumn()
    columns = (*rich.progress.Progress.get_default_columns(), amount)
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
