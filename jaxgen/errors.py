"""The one exception the command line turns into a line of advice."""


class UserError(ValueError):
    """Something the user gave cannot work.

    The message is one line: what is wrong, which value, and what to do. The command line prints it
    and exits with code 2; every other exception is a bug of ours and keeps its traceback.
    """
