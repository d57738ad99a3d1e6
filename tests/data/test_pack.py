import json
from collections import Counter

import numpy as np
import pytest
from corpus import texts

from jaxgen.data.config import DataConfig
from jaxgen.data.dataset import prepare
from jaxgen.data.documents import ReadReport
from jaxgen.data.loader import Loader
from jaxgen.data.pack import RowPacker, encode_texts, pack_documents
from jaxgen.data.rows import Manifest, PackedRows, decode_row, encode_row
from jaxgen.data.sources import Source
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError

SEQ_LEN = 64


def pack(folder, documents, seq_len=SEQ_LEN, eval_fraction=0.1):
    folder.mkdir()
    tokenizer = Tokenizer.from_bytes()
    return pack_documents(
        encode_texts(documents, tokenizer),
        folder,
        tokenizer=tokenizer,
        seq_len=seq_len,
        eval_fraction=eval_fraction,
        source="test",
        files=1,
        report=ReadReport(),
    )


def segments(folder, manifest, split):
    rows = PackedRows(folder, manifest, split)
    found = [row for index in range(len(rows)) for row in [rows[index]]]
    assert all(sum(map(len, row)) <= manifest.seq_len for row in found)
    return [tuple(segment.tolist()) for row in found for segment in row]


def pieces(document, seq_len=SEQ_LEN):
    """The pieces of a document, encoded alone and by hand."""
    ids = [256, *document.encode(), 257]
    return [tuple(ids[i : i + seq_len]) for i in range(0, len(ids), seq_len)]


def test_packed_rows_are_the_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgen.data.pack._SHARD_BYTES", 40 * 2 * SEQ_LEN)  # Several shards.
    monkeypatch.setattr("jaxgen.data.pack._ENCODE_CHARS", 3000)
    documents = texts(150)
    manifest = pack(tmp_path / "p", documents)
    assert len(manifest.train.shard_bytes) > 2
    train, held_out = (segments(tmp_path / "p", manifest, split) for split in ("train", "eval"))
    expected = Counter(piece for document in documents for piece in pieces(document))
    assert Counter(train) + Counter(held_out) == expected
    # Nothing of a document that is held out is trained on.
    kept = {document for document in documents if Counter(pieces(document)) <= Counter(train)}
    out = {document for document in documents if Counter(pieces(document)) <= Counter(held_out)}
    assert len(kept) + len(out) == len(documents)
    assert kept
    assert out
    assert manifest.documents == 150
    for info, found, its in ((manifest.train, train, kept), (manifest.eval, held_out, out)):
        assert info.tokens == sum(map(len, found))
        assert info.targets == info.tokens - len(found)
        assert info.text_bytes == sum(len(document.encode()) for document in its)
    assert Manifest.read(tmp_path / "p") == manifest


def test_bits_per_byte_divide_by_the_bytes_that_the_loss_is_of(tmp_path):
    """In documents of 3 bytes between two marks, 4 of 5 tokens count."""
    documents = [f"{number:03d}" for number in range(400)]
    manifest = pack(tmp_path / "p", documents, eval_fraction=0.5)
    rows = PackedRows(tmp_path / "p", manifest, "eval")
    config = DataConfig((Source("packed", str(tmp_path / "p")),))
    packed = prepare(config, SEQ_LEN)
    batches = Loader(packed, 4).held_out(len(rows))
    assert manifest.eval.targets == sum(batch.weights.sum() for batch in batches)
    assert packed.eval_bytes_per_token == 3 / 4


def test_packing_twice_gives_the_same_rows(tmp_path):
    one, two = (pack(tmp_path / name, texts(40)) for name in "ab")
    other = pack(tmp_path / "c", [*texts(39), "x"])
    assert one == two
    assert one.digest != other.digest


def test_copies_of_a_document_are_on_one_side(tmp_path):
    documents = texts(60, longest=5)
    manifest = pack(tmp_path / "p", documents * 2, eval_fraction=0.3)
    for split in ("train", "eval"):
        counts = Counter(segments(tmp_path / "p", manifest, split))
        assert counts
        assert all(count % 2 == 0 for count in counts.values())


def test_the_share_that_is_held_out(tmp_path):
    manifest = pack(tmp_path / "p", texts(3000, longest=8), eval_fraction=0.1)
    share = manifest.eval.tokens / (manifest.eval.tokens + manifest.train.tokens)
    assert abs(share - 0.1) < 5 * np.sqrt(0.1 * 0.9 / 3000)  # 5 standard deviations.


def test_one_large_document_is_both_trained_on_and_held_out(tmp_path):
    manifest = pack(tmp_path / "p", ["x" * 50_000], eval_fraction=1e-9)
    assert manifest.eval.tokens == 50_002 % 8192
    assert manifest.train.tokens + manifest.eval.tokens == 50_002
    assert manifest.train.text_bytes + manifest.eval.text_bytes == 50_000
    everything = pack(tmp_path / "q", ["x" * 50_000], eval_fraction=0.0)
    assert (everything.eval.rows, everything.eval.tokens) == (0, 0)


def test_no_document_that_fits_is_cut_and_little_is_wasted(tmp_path):
    rng = np.random.default_rng(0)
    packer = RowPacker(128, window=64)
    lengths = rng.integers(1, 129, 3000)
    added = [np.full(length, number) for number, length in enumerate(lengths)]
    rows = [row for piece in added for row in packer.add(piece)] + list(packer.finish())
    assert sorted(int(piece[0]) for row in rows for piece in row) == list(range(3000))
    sizes = [sum(map(len, row)) for row in rows]
    assert max(sizes) <= 128
    assert sum(sizes) / (128 * len(sizes)) > 0.95
    # One row in the window is first-come packing, which wastes far more.
    plain = RowPacker(128, window=1)
    count = len([row for piece in added for row in plain.add(piece)] + list(plain.finish()))
    assert len(rows) < 0.85 * count


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_record_keeps_its_row(dtype):
    row = [np.arange(3, dtype=np.int32), np.array([65_535], np.int32), np.arange(7, dtype=np.int32)]
    record = encode_row(row, np.dtype(dtype))
    assert len(record) == 4 * 4 + 11 * np.dtype(dtype).itemsize
    back = decode_row(record, np.dtype(dtype))
    assert [segment.tolist() for segment in back] == [segment.tolist() for segment in row]
    assert {segment.dtype for segment in back} == {np.dtype(np.int32)}


def test_damage_is_named(tmp_path):
    folder = tmp_path / "p"
    manifest = pack(folder, texts(20))
    shard = folder / "train-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train-00000\.array_record has \d+ bytes where"):
        PackedRows(folder, manifest, "train")
    path = folder / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(b"\xff" + whole)
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*; delete .*p and try again"):
        Manifest.read(folder)
    path.write_bytes(whole)
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"format": 0}))
    with pytest.raises(UserError, match="has format 0, not 3 or 4; pack it again"):
        Manifest.read(folder)
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="is damaged"):
        Manifest.read(folder)
    path.unlink()
    for no_folder in (folder, shard):
        with pytest.raises(UserError, match="is not a folder of packed rows; pack it first"):
            Manifest.read(no_folder)


def test_rows_whose_bytes_are_not_those_written_are_named(tmp_path):
    folder = tmp_path / "p"
    manifest = pack(folder, texts(60))
    shard = folder / "train-00000.array_record"
    content = bytearray(shard.read_bytes())
    content[1000:1100] = bytes(byte ^ 255 for byte in content[1000:1100])
    shard.write_bytes(content)
    found = PackedRows(folder, manifest, "train")
    with pytest.raises(UserError, match=r"train-00000\.array_record is damaged .*; delete .*p and"):
        [found[index] for index in range(len(found))]


def test_no_document_at_all(tmp_path):
    with pytest.raises(UserError, match="test holds no text: 1 files"):
        pack(tmp_path / "p", [])
    assert not (tmp_path / "p" / "manifest.json").exists()
