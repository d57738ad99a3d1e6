"""Where a run may live: a folder, or an address in an object store that answers."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

from etils import epath

from jaxgen.checkpoint.errors import blame
from jaxgen.errors import UserError

# epath would use TensorFlow's clients where that is installed, which know no S3 and no fsspec.
os.environ.setdefault("EPATH_USE_TF", "false")
_CLIENTS = {"gs": "gcsfs", "s3": "s3fs"}
_EXTRAS = {"gs": "gcs", "s3": "s3"}


def resolve(address: str | os.PathLike) -> epath.Path:
    """Returns the path at a folder or an address; touches nothing there.

    Raises:
        UserError: a store that Orbax cannot write to, or whose client is not installed.
    """
    text = os.fspath(address)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return epath.Path(text)
    if scheme not in _CLIENTS:
        raise UserError(
            f"checkpoints cannot be in {text}: Orbax does not write to {scheme}://; "
            "use gs://, s3://, or a folder (a mounted bucket is one)"
        )
    prepare(text)
    return epath.Path(text)


def prepare(address: str) -> None:
    """Sets fsspec up for an address, where it needs that.

    Raises:
        UserError: the client of its store is not installed.
    """
    scheme, separator, _ = address.partition("://")
    if not separator or scheme not in _CLIENTS:
        return
    if importlib.util.find_spec(_CLIENTS[scheme]) is None:
        raise UserError(
            f"{address} needs the package {_CLIENTS[scheme]}; "
            f"install it: pip install 'jaxgen[{_EXTRAS[scheme]}]'"
        )
    import fsspec

    settings = fsspec.config.conf.setdefault(scheme, {})
    # tensorstore and other processes write too: what a listing was, it need not be any more.
    settings.setdefault("use_listings_cache", False)
    # All of AWS's tools know this variable but Python's, which knows AWS_DEFAULT_REGION alone.
    if scheme == "s3" and (region := os.environ.get("AWS_REGION")):
        settings.setdefault("client_kwargs", {"region_name": region})


def is_local(path: epath.Path) -> bool:
    """Whether this is a path of a file system and not of an object store."""
    return "://" not in str(path)


@contextlib.contextmanager
def reaching(path: epath.Path) -> Iterator[None]:
    """Turns what a store's client raises into a line for the user."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_local(path) or not (reason := blame(error)):
            raise
        raise UserError(f"{path} cannot be used: {reason}") from error


def check_writable(path: epath.Path) -> None:
    """Asks an object store once whether it takes writes; tensorstore would ask it for ever.

    Raises:
        UserError: it does not, or there is no such bucket.
    """
    if is_local(path):
        return
    with reaching(path):
        try:
            (path / "writable").write_text("")
            (path / "writable").unlink()
        except FileNotFoundError as error:
            raise UserError(f"{path} cannot be used: there is no such bucket") from error
