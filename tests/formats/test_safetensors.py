"""Safetensors files: laid out as the library lays them out, and refused where they are broken."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from small_folders import write_file

from jaxgen.data import sources
from jaxgen.errors import UserError
from jaxgen.formats import safetensors
from jaxgen.formats.safetensors import Spec, in_order, make_header, open_folder, read_header, split

FLOAT32, HALF = np.dtype(np.float32), np.dtype(jnp.bfloat16)
A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.float32)
INDEX = "model.safetensors.index.json"


@pytest.mark.smoke
def test_a_header_is_laid_out_as_by_the_library():
    specs = {
        "a.b": Spec(HALF, (3,)),
        "z": Spec(FLOAT32, (2, 1)),
        "b": Spec(np.dtype(np.float16), (1,)),
        "a": Spec(FLOAT32, (1,)),
    }
    header = make_header(in_order(specs))
    # Wider dtypes first, bfloat16 before float16, names in order; blanks up to a multiple of 8.
    text = (
        '{"__metadata__":{"format":"pt"},'
        '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        '"z":{"dtype":"F32","shape":[2,1],"data_offsets":[4,12]},'
        '"a.b":{"dtype":"BF16","shape":[3],"data_offsets":[12,18]},'
        '"b":{"dtype":"F16","shape":[1],"data_offsets":[18,20]}}'
    )
    padded = text + " " * (-len(text) % 8)
    assert header == struct.pack("<Q", len(padded)) + padded.encode()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("place", ["", "memory://files"])
def test_any_part_of_a_tensor_is_read_by_itself(tmp_path, dtype, place):
    url = f"{place or tmp_path}/model.safetensors"
    write_file(url, {"b": B.astype(dtype), "a": A.astype(dtype)}, {"__metadata__": {"x": "y"}})
    tensors = read_header(url)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (2, 3), "b": (4,)}
    for start, stop in ((0, 6), (3, 6), (1, 2)):
        part = tensors["a"].read(start, stop)
        assert part.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(part, A.reshape(-1)[start:stop].astype(dtype))


def test_large_models_are_cut_into_numbered_files():
    specs = {f"t{i}": Spec(FLOAT32, (n,)) for i, n in enumerate((10, 10, 30, 1, 1))}
    files = split(specs, 100)
    assert {file: list(tensors) for file, tensors in files.items()} == {
        "model-00001-of-00003.safetensors": ["t0", "t1"],
        "model-00002-of-00003.safetensors": ["t2"],
        "model-00003-of-00003.safetensors": ["t3", "t4"],
    }
    index = json.loads(safetensors.make_index(files))
    assert index["metadata"] == {"total_size": 52 * 4}
    assert index["weight_map"]["t2"] == "model-00002-of-00003.safetensors"
    assert list(split(specs, 208)) == ["model.safetensors"]


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes}


@pytest.mark.parametrize(
    ("header", "line"),
    [
        (entry(dtype="I8"), "tensor a is of dtype I8; save the model as one of F64, F32, BF16, F1"),
        (entry(dtype="F8_E4M3"), "tensor a is of dtype F8_E4M3"),
        (entry(data_offsets=[0, 20]), r"tensor a, F32\[2, 3\], has 20 bytes"),
        (entry(data_offsets=[8, 32]), "tensor a begins at byte"),
        (entry(shape=[2, 4], data_offsets=[0, 32]), "tensor b begins at byte"),
        (entry(shape=[2, -3]), "does not say where tensors are"),
        (entry(shape="23"), "does not say where tensors are"),
        (entry(data_offsets=[0]), "does not say where tensors are"),
        ({"a": 3}, "does not say where tensors are"),
    ],
)
def test_a_header_that_contradicts_itself_is_one_line(tmp_path, header, line):
    url = str(tmp_path / "model.safetensors")
    write_file(url, {"a": A, "b": B}, header)
    with pytest.raises(UserError, match=line) as error:
        read_header(url)
    assert str(error.value).startswith(url)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 7, 8, 60, -1, -30])
def test_a_file_that_is_cut_short_is_one_line(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    write_file(path, {"a": A, "b": B})
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    line = "its tensors end at byte" if keep < 0 else "is cut short, or no safetensors file"
    with pytest.raises(UserError, match=line) as error:
        read_header(str(path))
    assert "copy or download it again" in str(error.value)


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>", struct.pack("<Q", 8) + b"[[[[[[[[", b"x" * 300]
)
def test_a_file_of_another_kind_is_one_line(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cut short|does not say where"):
        open_folder(str(tmp_path))


def test_what_follows_the_tensors_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    write_file(path, {"a": A})
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(UserError, match="its tensors end at byte"):
        read_header(str(path))


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    write_file(path, {"a": A})
    tensor = read_header(str(path))["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="has changed while it was read"):
        tensor.read(0, 6)


def test_a_name_that_stands_twice_is_refused(tmp_path):
    one = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f"{{{one},{one}}}".encode()
    raw = struct.pack("<Q", len(text)) + text + bytes(4)
    sources.write_bytes(f"{tmp_path}/model.safetensors", raw)
    with pytest.raises(UserError, match="a is named twice"):
        open_folder(str(tmp_path))


def write_sharded(folder, files, places=None):
    for file, tensors in files.items():
        write_file(folder / file, tensors)
    places = places or {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def test_several_files_are_one_set_of_tensors(tmp_path):
    write_sharded(tmp_path, {"1.safetensors": {"a": A}, "2.safetensors": {"b": B}})
    found = open_folder(str(tmp_path))
    assert {name: tensor.url[-13:] for name, tensor in found.items()} == {
        "a": "1.safetensors",
        "b": "2.safetensors",
    }


def test_files_that_do_not_fit_their_index_are_refused(tmp_path):
    both = {"1.safetensors": {"a": A}, "2.safetensors": {"a": A, "b": B}}
    write_sharded(tmp_path, both, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(UserError, match=r"tensor a is in .*/1\.safetensors and in 2\.safetensors"):
        open_folder(str(tmp_path))
    write_sharded(tmp_path, {"2.safetensors": {"b": B}}, {"a": "1.safetensors", "b": "2.safetenso"})
    with pytest.raises(UserError, match=r"has no 2\.safetenso, which its model\.safetensors\.inde"):
        open_folder(str(tmp_path))
    files = {"1.safetensors": {"a": A}, "2.safetensors": {"b": B}}
    write_sharded(tmp_path, files, {"a": "1.safetensors", "c": "2.safetensors"})
    with pytest.raises(UserError, match=r"2\.safetensors has no tensor c"):
        open_folder(str(tmp_path))
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no 1\.safetensors, which its .* names; copy or down"):
        open_folder(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"metadata": {}}']
)
def test_an_index_of_another_kind_is_one_line(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match="does not say where tensors are"):
        open_folder(str(tmp_path))


@pytest.mark.parametrize("file", ["../1.safetensors", "/1.safetensors", "memory://1.safetensors"])
def test_an_index_names_files_of_its_folder_alone(tmp_path, file):
    write_file(tmp_path / "1.safetensors", {"a": A})
    (tmp_path / "in").mkdir()
    write_sharded(tmp_path / "in", {}, {"a": file})
    with pytest.raises(UserError, match=rf"index\.json: {file} is not in the folder; copy or"):
        open_folder(str(tmp_path / "in"))


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        open_folder(str(tmp_path))
