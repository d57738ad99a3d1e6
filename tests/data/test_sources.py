import gzip
import json
import random
import sys

import fsspec
import pytest

from jaxgen.data.config import DataConfig
from jaxgen.data.dataset import prepare
from jaxgen.data.documents import ReadReport, read_documents
from jaxgen.data.sources import Source, list_files
from jaxgen.errors import UserError


def read(source):
    report = ReadReport()
    files = list_files(source)
    documents = list(read_documents(source, files, report))
    assert report.bytes_read == sum(file.size for file in files)
    return documents, report


def test_text_files_come_in_sorted_order(tmp_path):
    for name in ("b.py", "a.py", "sub/c.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"# {name}\r\n".encode())
    for hidden in (".git/x.py", "sub/.venv/y.py", ".z.py"):
        path = tmp_path / hidden
        path.parent.mkdir(exist_ok=True)
        path.write_text("never")
    documents, _ = read(Source("text", f"{tmp_path}/**/*.py"))
    assert documents == [f"# {name}\r\n" for name in ("a.py", "b.py", "sub/c.py")]


def test_a_dot_folder_that_is_spelt_out_is_read(tmp_path):
    folder = tmp_path / ".data"
    folder.mkdir()
    (folder / "a[1].txt").write_text("yes")
    assert read(Source("text", f"{folder}/*.txt"))[0] == ["yes"]
    assert read(Source("text", f"{folder}/a[1].txt"))[0] == ["yes"]


def test_what_is_left_out_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_text("text")
    documents, report = read(Source("text", f"{tmp_path}/*.txt"))
    assert documents == ["text"]
    assert (report.undecodable, report.empty) == (1, 1)
    assert report.undecodable_examples == [f"{tmp_path}/a.txt"]


def test_jsonl_plain_and_compressed(tmp_path):
    lines = [json.dumps({"body": f"line {number}\nmore"}) for number in range(5)]
    lines += ["", '{"body": null}', '{"body": "half \\ud800 pair"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:2]).encode()))
    source = Source("jsonl", f"{tmp_path}/*.jsonl*", text_field="body")
    documents, report = read(source)
    assert documents == [f"line {number}\nmore" for number in (*range(5), 0, 1)]
    assert (report.undecodable, report.empty) == (1, 1)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.table({"text": ["one", None, "two"], "number": [1, 2, 3]})
    parquet.write_table(rows, tmp_path / "a.parquet")
    documents, report = read(Source("parquet", f"{tmp_path}/*.parquet"))
    assert documents == ["one", "two"]
    assert report.empty == 1
    for field, line in (("body", "no column 'body' but text, number"), ("number", "holds int")):
        with pytest.raises(UserError, match=line):
            read(Source("parquet", f"{tmp_path}/a.parquet", text_field=field))
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(UserError, match=r"b\.parquet is not a Parquet file"):
        read(Source("parquet", f"{tmp_path}/*.parquet"))


def test_parquet_without_its_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_text("")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'jaxgen\[parquet\]'"):
        read(Source("parquet", f"{tmp_path}/a.parquet"))


def test_a_location_of_fsspec():
    fs = fsspec.filesystem("memory")
    fs.pipe({"/sources/x/b.txt": b"second", "/sources/x/a.txt": b"first"})
    before = list_files(Source("text", "memory://sources/**/*.txt"))
    assert read(Source("text", "memory://sources/**/*.txt"))[0] == ["first", "second"]
    fs.pipe({"/sources/x/b.txt": b"SECOND"})
    assert list_files(Source("text", "memory://sources/**/*.txt")) != before


def test_the_standard_library_is_there():
    files = list_files(Source())
    assert sum(file.size for file in files) > 5e6
    assert not any("site-packages" in file.url for file in files)
    (json_module,) = [file for file in files if file.url == json.__file__]
    (text,) = read_documents(Source(), [json_module], ReadReport())
    assert text.startswith('r"""JSON')


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"kind": "text"}, "kind text has no path"),
        ({"kind": "stdlib", "path": "x"}, "takes no path"),
        ({"kind": "packed", "path": "gs://b/x"}, "path='gs://b/x' of kind packed is a URL; "),
        ({"weight": 0.0}, r"weight=0\.0; use a number above 0"),
    ],
)
def test_a_source_that_cannot_be(fields, line):
    with pytest.raises(UserError, match=line):
        Source(**fields)


def test_an_unknown_kind():
    source = Source("text", "x")
    object.__setattr__(source, "kind", "csv")  # The type checker of the tests refuses it earlier.
    with pytest.raises(UserError, match="kind 'csv' is unknown; use one of stdlib, text"):
        source.__post_init__()


def test_a_path_that_cannot_be_read(tmp_path):
    for path, line in (
        (f"{tmp_path}/nothing.txt", "no file matches"),
        (f"{tmp_path}/*.txt", "no file matches"),
        (str(tmp_path), "is a folder; give a glob"),
        ("nosuch://bucket/x", "Protocol not known"),
    ):
        with pytest.raises(UserError, match=line):
            list_files(Source("text", path))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "a.jsonl.gz cannot be used: Not a gzipped file"),
        (gzip.compress(b'{"text": "x"}')[:-9], "a.jsonl.gz cannot be used: Compressed file ended"),
        (gzip.compress(b"")[:10] + b"\xff" * 20, "a.jsonl.gz cannot be used: Error -3"),
    ],
)
def test_a_damaged_file_is_named_and_not_the_cache(tmp_path, content, message, tokenizer):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    source = Source("jsonl", f"{tmp_path}/a.jsonl.gz")
    with pytest.raises(UserError) as error:
        prepare(DataConfig((source,), tokenizer, cache_dir=str(tmp_path / "cache")), 64)
    assert message in str(error.value)
    assert list((tmp_path / "cache").glob("*.partial")) == []


def test_a_damaged_parquet_file_is_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    draw = random.Random(0)
    table = pyarrow.table({"text": ["".join(draw.choices("abcdef ", k=50)) for _ in range(500)]})
    parquet.write_table(table, path, compression="snappy", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[2000:2100] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet cannot be used: Corrupt snappy"):
        read(Source("parquet", str(path)))
    parquet.write_table(pyarrow.table({"text": ["x" * 99]}), path, compression="none")
    path.write_bytes(path.read_bytes().replace(b"x" * 99, b"\xff" * 99))
    with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file, or damaged: 'utf-8'"):
        read(Source("parquet", str(path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl:2 is not JSON"),
        ('{"txt": ""}', r"a\.jsonl:2 has no field 'text' but txt"),
        ("[]", "has no field 'text' but list"),
        ('{"text": 3}', "holds int, not text"),
    ],
)
def test_a_bad_record_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(UserError, match=message):
        read(Source("jsonl", f"{tmp_path}/a.jsonl"))
