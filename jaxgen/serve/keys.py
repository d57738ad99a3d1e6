"""Who may ask a server."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxgen.errors import UserError

VARIABLE = "JAXGEN_API_KEY"


def read_keys(files: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Returns the API keys in files, one a line, and the one in the environment.

    They never come as arguments, which every user of a machine can read.

    Raises:
        UserError: a file cannot be read or has no key, or a key would not fit into a header.
    """
    keys = [environ[VARIABLE]] if VARIABLE in environ else []
    for file in files:
        try:
            found = Path(file).read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {file} cannot be read ({error})") from None
        keys += (mine := [line.strip() for line in found if line.strip()])
        if not mine:
            raise UserError(f"--api-key-file {file} has no key; write one on each line")
    for key in keys:
        if not key.isprintable() or key != key.strip() or not key:
            raise UserError("an API key is empty, or has spaces around it or a control character")
    return keys
