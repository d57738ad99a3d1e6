import corpus
import pytest

from jaxgen.data.dataset import prepare
from jaxgen.data.loader import Loader
from jaxgen.data.show import pack, show
from jaxgen.errors import UserError


def test_show_prints_the_text_of_the_step(tmp_path):
    config = corpus.config(tmp_path)
    text = show(config, 256, 4, 2)
    batch = Loader(prepare(config, 256), 4).host_batch(1)
    assert text.startswith(f"step 2: 4 rows of 256 tokens; {int(batch.weights.sum())} targets, ")
    assert text.count("=== row ") == 4
    assert text.count("--- document ") == batch.segments.max(axis=1).sum()
    # Every document that is whole in these rows is there, letter by letter.
    whole = [
        document
        for document in corpus.texts(60)
        if f"<|begin_of_text|>{document}<|end_of_text|>\n" in text + "\n"
    ]
    assert len(whole) >= 3
    assert text.count("<|begin_of_text|>") >= len(whole)
    assert show(config, 256, 4, 2) == text
    assert show(config, 256, 4, 3) != text
    assert show(config, 256, 4, 2, max_rows=1).count("=== row ") == 1


@pytest.mark.parametrize("step", [-1, 0, 2**31, 10**20])
def test_a_step_that_no_run_has_is_refused_before_anything_is_packed(tmp_path, step):
    with pytest.raises(UserError, match=f"--step {step}; use a number from 1 to 2147483647"):
        show(corpus.config(tmp_path), 256, 4, step)
    assert not (tmp_path / "cache").exists()


def test_pack_prints_what_was_packed(tmp_path):
    config = corpus.config(tmp_path)
    (tmp_path / "texts" / "latin.txt").write_bytes(b"\xe9")
    text = pack(config, 64)
    (manifest,) = prepare(config, 64).manifests
    assert "61 files, 60 documents; left out 1 not UTF-8, 0 empty" in text
    assert "latin.txt" in text
    assert f"{manifest.train.rows:,} rows of 64, {manifest.train.tokens:,} tokens" in text
    assert "100.0% of the rows" in text
