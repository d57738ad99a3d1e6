"""Folders read and written by two processes, and in object stores."""

import json
from pathlib import Path

from processes import run_processes
from small_folders import LLAMA, write_folder

from jaxgen.formats import safetensors

TESTS = str(Path(__file__).parent)
PROCESSES = """
    import jaxgen
    from jaxgen.sharding import MeshConfig, make_mesh

    source, out = sys.argv[1:]
    pretrained = jaxgen.open_model(source)
    mesh = make_mesh(MeshConfig(pipeline=2, tensor=2, fsdp=1))
    model, _ = jaxgen.load_model(pretrained, pretrained.serve_config(), mesh)
    assert not model.layers.mlp.up.is_fully_addressable
    pretrained.write(out, model)
    distributed.barrier("end", 60)
    print("wrote")
    """
STORE = """
    import sys
    bucket, tests = sys.argv[1:]
    sys.path.insert(0, tests)
    from small_folders import write_folder
    from jaxgen.checkpoint import address
    from jaxgen.cli import main
    from jaxgen.data import sources
    from jaxgen.pretrained import open_model

    address.prepare(bucket)
    write_folder(f"{bucket}/in", shards=2)
    argv = ["convert", "to-hf", f"{bucket}/in", f"{bucket}/out"]
    assert main([*argv, "--devices", "8"]) == 0
    one, two = open_model(f"{bucket}/in"), open_model(f"{bucket}/out")
    assert one.config == two.config
    for name, tensor in one.stored.items():
        num = tensor.nbytes // tensor.dtype.itemsize
        assert (tensor.read(0, num) == two.stored[name].read(0, num)).all()
    assert main(argv) == 2
    assert main(["convert", "to-hf", f"{bucket}/none", f"{bucket}/other"]) == 2
    """


def test_two_processes_write_what_one_read(tmp_path):
    write_folder(tmp_path / "in")
    outputs = run_processes(PROCESSES, str(tmp_path / "in"), str(tmp_path / "out"))
    assert all(output.endswith("wrote\n") for output in outputs)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == LLAMA
    want, found = (safetensors.open_folder(str(tmp_path / name)) for name in ("in", "out"))
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        num = tensor.nbytes // 4
        assert (found[name].read(0, num) == tensor.read(0, num)).all(), name


def test_a_bucket_is_read_and_written(bucket):
    done = bucket.run_script(STORE, TESTS)
    refusals = done.stderr.strip().splitlines()[-2:]
    assert f"{bucket.url}/out is not empty; give a new folder" in refusals[0]
    assert f"{bucket.url}/none is no model" in refusals[1]
