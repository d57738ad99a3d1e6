"""Which failures of a save are the storage's, said in a few words."""

import errno
import re

from jaxgen.errors import is_of_store

_OF_STORAGE = {
    errno.ENOSPC: "no space is left; free some, or use another run directory",
    errno.EDQUOT: "the quota is used up; free some space, or use another run directory",
    errno.EFBIG: "a file would be too large for the limits of this process or file system",
    errno.EROFS: "it is read-only; use another run directory",
    errno.EACCES: "permission denied; use a run directory that you may write to",
    errno.EPERM: "permission denied; use a run directory that you may write to",
    errno.ENOTDIR: "a file is in the way; use another run directory",
    errno.ECONNREFUSED: "the storage cannot be reached",
    errno.EHOSTUNREACH: "the storage cannot be reached",
    errno.ENETUNREACH: "the storage cannot be reached",
    errno.ETIMEDOUT: "the storage did not answer",
    errno.EIO: "the storage failed (input/output error)",
}


def blame(error: BaseException) -> str | None:
    """Returns what the storage lacks, and what to do, or None if the storage is not at fault."""
    for one in _chain(error):
        reason = _OF_STORAGE.get(getattr(one, "errno", None) or _named_errno(str(one)))
        if reason:
            return reason
        # s3fs raises PermissionError without a number.
        if is_of_store(one) or isinstance(one, PermissionError):
            return (str(one).strip() or type(one).__name__).splitlines()[0]
    return None


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                yield from _chain(inner)
        error = error.__cause__ or error.__context__


def _named_errno(text: str) -> int:
    """tensorstore raises ValueError("RESOURCE_EXHAUSTED: ... [os_error_code='28']")."""
    found = re.search(r"os_error_code='(\d+)'", text)
    return int(found[1]) if found else 0
