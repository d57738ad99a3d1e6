"""The one exception the command line turns into a line of advice, and the stores' own."""

_STORE_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs")


class UserError(ValueError):
    """Something the user gave cannot work.

    The message is one line: what is wrong, which value, and what to do. The command line prints it
    and exits with code 2; every other exception is a bug of ours and keeps its traceback.
    """


def is_of_store(error: BaseException) -> bool:
    """Whether an object store's client raised it: no credentials, no answer, no such bucket."""
    return type(error).__module__.partition(".")[0] in _STORE_CLIENTS
