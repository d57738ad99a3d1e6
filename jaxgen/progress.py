"""How far something has come, for whoever sits at a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    name: str, total: int, *, is_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how much of `total` is done, and a bar shows it.

    The bar is on standard error and gone at the end; where that is no terminal, there is none.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    import rich.console
    import rich.progress

    amount = rich.progress.DownloadColumn() if is_bytes else rich.progress.MofNCompleteColumn()
    columns = (*rich.progress.Progress.get_default_columns(), amount)
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.update(task, completed=done)
