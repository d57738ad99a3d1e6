"""The directory of a run: no other's, and one training at a time in it."""

import fcntl
import os

from etils import epath

from jaxgen import distributed
from jaxgen.checkpoint.address import is_local
from jaxgen.errors import UserError


class RunDirectory:
    """A run directory and, while this is entered, the right to train in it.

    Process 0 holds a lock on the folder. The system drops it when the process ends, however it
    does. An object store has none, nor have some network file systems: there nobody is kept out.
    """

    def __init__(self, path: epath.Path):
        """Touches nothing yet."""
        self.path = path
        self._held: int | None = None

    def claim(self, make: bool = False) -> None:
        """Takes the lock if the folder is there; with `make`, makes it first.

        Raises:
            UserError: on every process: it is not a run's, or another training has it.
        """
        distributed.agree("run directory", lambda: self._claim(make))

    def _claim(self, make: bool) -> None:
        from jaxgen.config import FILE_NAME, read_config

        if (self.path / FILE_NAME).exists():
            try:
                read_config(self.path)
            except UserError as error:
                raise UserError(f"not a run directory: {error}; give another --run-dir") from error
        if not is_local(self.path) or self._held is not None:
            return
        try:
            if make:
                self.path.mkdir(parents=True, exist_ok=True)
            if not self.path.is_dir():
                return
            self._held = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot use {self.path}: {reason}; give another --run-dir") from error
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another training is under way in {self.path}; stop it or give another --run-dir"
            ) from None
        except OSError:
            return  # A file system without locks.

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exception):
        if self._held is not None:
            os.close(self._held)
            self._held = None
