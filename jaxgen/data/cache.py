"""Folders that are built once: whole or not there, however many processes ask and die."""

import fcntl
import os
import pathlib
import shutil
import sys
from collections.abc import Callable

from jaxgen.errors import UserError


def default_cache_dir() -> pathlib.Path:
    """Returns `$XDG_CACHE_HOME/jaxgen/data`, or `~/.cache/jaxgen/data`."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "jaxgen" / "data"


def build_once(folder: pathlib.Path, build: Callable[[pathlib.Path], object]) -> pathlib.Path:
    """Returns `folder`, calling `build(partial_folder)` first if it is not there.

    `build` fills a folder beside it, which is renamed when it is complete, so `folder` is never
    half-written. Of several processes one builds and the others wait: they share a file lock, which
    the system drops when its holder dies. A folder that is there is used without writing anything.

    Raises:
        UserError: the cache cannot be written.
    """
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(folder.name + ".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"data: waiting for another process to build {folder}", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder
            # What lies here now was left by a process that was killed: the lock is ours.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the data cache at {folder.parent}: {error.strerror or error}; "
            "set data.cache_dir to a folder with room"
        ) from error
    return folder
