"""The process of the `jaxgen` command: `python -m jaxgen` and the installed script."""

import os
import sys

from jaxgen.cli import main

TUNABLES = "GLIBC_TUNABLES"


def run() -> int:
    """Runs the command with huge pages for large arrays; returns its exit code.

    XLA on CPU takes its temporary memory from malloc anew at every step, and the kernel hands it
    out in pages of 4 KB: a quarter of a training step of 8M parameters. glibc asks for pages of
    2 MB if it is told so when the process starts, so this one starts itself again, once.
    """
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)
    return main()


if __name__ == "__main__":
    sys.exit(run())
