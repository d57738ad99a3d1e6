"""The one exception the command line turns into a line of advice, and the stores' own."""

_STORE_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs")


class UserError(ValueError):
    """Something the user gave cannot work.

    The message is one line: what is wrong, which value, and what to do. The command line prints it
    and exits with code 2; every other exception is a bug of ours and keeps its traceback.
    """


class MeshError(UserError):
    """A mesh that does not fit its devices, or a model that does not fit the mesh."""

    def __init__(self, problem: str, advice: str, otherwise: str | None = None):
        """Says what is wrong, a mesh that may do, and what else does."""
        super().__init__(f"{problem}; use {advice}" + (f", or {otherwise}" if otherwise else ""))
        self.problem, self.otherwise = problem, otherwise

    def advising(self, advice: str) -> "MeshError":
        """Returns the same with another mesh."""
        return MeshError(self.problem, advice, self.otherwise)


def is_of_store(error: BaseException) -> bool:
    """Whether an object store's client raised it: no credentials, no answer, no such bucket."""
    return type(error).__module__.partition(".")[0] in _STORE_CLIENTS
