"""Who may ask a server, and for what."""

import hmac
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxgen.errors import UserError
from jaxgen.serve.refusal import NO_ADMIN, NO_KEY, Refusal

VARIABLE, ADMIN_VARIABLE = "JAXGEN_API_KEY", "JAXGEN_ADMIN_KEY"
ADMIN = "/admin/"
_OPEN_PATHS = frozenset(("/", "/health", "/ready", "/metrics", "/openapi.json"))


class Keys:
    """The keys of a server: of those who ask the model, and of those who run it."""

    def __init__(self, keys: Iterable[str], admin_keys: Iterable[str]):
        """Takes all that are valid.

        Args:
            keys: one of these must come with a request; none: whoever reaches the server may ask.
            admin_keys: likewise for what is below /admin/; none: nobody may.
        """
        self._keys, self._admin_keys = ([k.encode() for k in each] for each in (keys, admin_keys))

    def __bool__(self) -> bool:
        """Whether who asks the model needs one."""
        return bool(self._keys)

    def refuse(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Refusal | None:
        """Returns what to tell who lacks the key that a request needs, or None."""
        keys = self._keys
        if path.startswith(ADMIN):
            keys = self._admin_keys
            if not keys:
                return NO_ADMIN
        elif not keys or path in _OPEN_PATHS:
            return None
        given = [value for name, value in headers if name == b"authorization"]
        kind, _, key = given[0].partition(b" ") if given else (b"", b"", b"")
        # All are compared, so that the time tells nothing.
        found = [hmac.compare_digest(key.strip(), each) for each in keys]
        return None if kind.lower() == b"bearer" and any(found) else NO_KEY


def read_keys(
    files: Sequence[str],
    environ: Mapping[str, str],
    *,
    option: str = "--api-key-file",
    variable: str = VARIABLE,
) -> list[str]:
    """Returns the keys in files, one a line, and the one in the environment.

    They never come as arguments, which every user of a machine can read.

    Args:
        files: their paths.
        environ: the environment.
        option: which has named the files.
        variable: of the environment.

    Raises:
        UserError: a file cannot be read or has no key, or a key would not fit into a header.
    """
    keys = [environ[variable]] if variable in environ else []
    for file in files:
        try:
            found = Path(file).read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{option} {file} cannot be read ({error})") from None
        keys += (mine := [line.strip() for line in found if line.strip()])
        if not mine:
            raise UserError(f"{option} {file} has no key; write one on each line")
    for key in keys:
        if not key.isprintable() or key != key.strip() or not key:
            raise UserError(
                f"a key of {option} or {variable} is empty, or has spaces around it or a control "
                "character"
            )
    return keys
