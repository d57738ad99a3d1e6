"""Teaches Orbax to keep arrays in S3.

Orbax 0.12.8 knows two kinds of places, folders and gs://, though tensorstore, which writes for it,
knows S3 too. Three functions of Orbax tell the two apart; here each is told of s3:// and left as it
is for every other address. They are private, so whether they are there is asked first.
"""

import functools
import importlib
import os
from typing import Any

from jaxgen.errors import UserError

SCHEME = "s3://"


@functools.cache
def teach_orbax() -> None:
    """Makes Orbax take s3:// addresses, in this process and from now on.

    Raises:
        UserError: this version of Orbax is made in another way.
    """
    specs = importlib.import_module("orbax.checkpoint._src.serialization.tensorstore_utils")
    gcs = importlib.import_module("orbax.checkpoint._src.path.gcs_utils")
    answers = {
        (specs, "_normalize_path"): lambda path: SCHEME + os.path.normpath(path[len(SCHEME) :]),
        (specs, "_use_gcs_driver"): lambda directory: True,
        (gcs, "get_kvstore_for_gcs"): kvstore,
    }
    for module, name in answers:
        if not hasattr(module, name):
            version = importlib.import_module("orbax.checkpoint").__version__
            raise UserError(
                f"checkpoints cannot be in S3 with orbax-checkpoint {version}, which has no "
                f"{name}; install 0.12.8, or use another place for the run"
            )
    for (module, name), answer in answers.items():
        original = getattr(module, name)

        def extended(address: str, answer=answer, original=original) -> Any:
            return (answer if address.startswith(SCHEME) else original)(address)

        setattr(module, name, extended)


def kvstore(address: str) -> dict[str, Any]:
    """Returns tensorstore's spec of an s3:// address, for the server that s3fs talks to.

    tensorstore reads neither AWS_ENDPOINT_URL nor ~/.aws/config. Of a bucket on AWS itself it finds
    out the endpoint and the region alone, and from where the bucket is.
    """
    import fsspec

    bucket, _, path = address.removeprefix(SCHEME).partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    meta = fsspec.filesystem("s3").s3.meta
    if ".amazonaws.com" not in meta.endpoint_url:
        spec |= {"endpoint": meta.endpoint_url, "aws_region": meta.region_name}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # Else it looks into ~/.aws too, and complains on standard error where there is none.
        spec["aws_credentials"] = {"type": "environment"}
    return spec
