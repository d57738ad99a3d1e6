"""Two processes of two devices generate what one device does, each making the same plans."""

import json
from pathlib import Path

import jax
import pytest
from processes import run_processes
from small_model import ONE, make, mesh_of

from jaxgen.serve.generate import Generator
from jaxgen.serve.request import SamplingConfig

pytestmark = pytest.mark.full

PROMPTS = [[n, 3 * n % 96] * (1 + 5 * n) for n in range(1, 6)]
SCRIPT = """
    import json
    sys.path.insert(0, sys.argv[1])
    from small_model import make, mesh_of
    from jaxgen.compiler import enable_compilation_cache
    from jaxgen.errors import UserError
    from jaxgen.serve.engine import Engine
    from jaxgen.serve.generate import Generator
    from jaxgen.serve.request import SamplingConfig
    from jaxgen.sharding import MeshConfig

    enable_compilation_cache(sys.argv[2])
    with jax.set_mesh(mesh_of((MeshConfig(data=2, tensor=2), 4))):
        model = make()
        sampling = SamplingConfig(max_tokens=12, temperature=1.0)
        print(json.dumps(Generator(model)(json.loads(sys.argv[3]), sampling, [5])))
        try:
            Engine(model)
        except UserError as error:
            print(error)
    """


def test_two_processes_generate_as_one_device_does():
    with jax.set_mesh(mesh_of(ONE)):
        sampling = SamplingConfig(max_tokens=12, temperature=1.0)
        expected = Generator(make())(PROMPTS, sampling, [5])
    cache = jax.config.values["jax_compilation_cache_dir"]
    outputs = run_processes(SCRIPT, str(Path(__file__).parent), cache, json.dumps(PROMPTS))
    for output in outputs:
        *_, tokens, refusal = output.splitlines()  # The first are of the collectives.
        assert json.loads(tokens) == expected
        assert "one process and there are 2, " in refusal
        assert refusal.endswith("use jaxgen.Generator, alike in all of them")
