import dataclasses
import gc
import threading
import time

import corpus
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxgen.data.dataset import prepare
from jaxgen.data.loader import Loader, rows_of
from jaxgen.data.sources import Source
from jaxgen.errors import UserError
from jaxgen.sharding import MeshConfig, Rules, make_mesh, zigzag

BATCH, SEQ_LEN = 8, 64


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    small = corpus.write(folder / "small", corpus.texts(30, seed=1))
    config = corpus.config(folder, count=90)
    sources = (*config.sources, dataclasses.replace(small, weight=0.5))
    return prepare(dataclasses.replace(config, sources=sources), SEQ_LEN)


def sharding(**axes):
    mesh = make_mesh(MeshConfig(**axes))
    return NamedSharding(mesh, Rules().on(mesh)("batch", "seq"))


def assert_equal(one, two):
    for name, a, b in zip(one._fields, one, two, strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_batch_by_hand(packed):
    """Every field of every row, from the packed segments by a loop over the tokens."""
    loader = Loader(packed, 16)
    batch = loader.host_batch(3)
    assert [a.dtype for a in batch] == [np.dtype(np.int32)] * 4 + [np.dtype(np.float32)]
    assert all(a.shape == (16, SEQ_LEN) for a in batch)
    for row, (source, index) in enumerate(zip(*loader.locate(3), strict=True)):
        expected = []
        for number, ids in enumerate(packed.train[source][int(index)], start=1):
            for position, token in enumerate(ids.tolist()):
                last = position + 1 == len(ids)
                target = packed.tokenizer.pad_id if last else int(ids[position + 1])
                expected.append((token, target, position, number, 0.0 if last else 1.0))
        pad = packed.tokenizer.pad_id
        expected += [(pad, pad, 0, 0, 0.0)] * (SEQ_LEN - len(expected))
        assert list(zip(*(a[row].tolist() for a in batch), strict=True)) == expected
    assert batch.segments.max() > 1
    assert (batch.segments == 0).any()


def test_a_step_is_found_alone(packed):
    straight = [Loader(packed, BATCH).host_batch(step) for step in range(12)]
    resumed = Loader(packed, BATCH)
    assert_equal(resumed.host_batch(7), straight[7])
    with resumed.batches(9, 12) as batches:
        for batch, expected in zip(batches, straight[9:], strict=True):
            assert_equal(batch, expected)
    assert not np.array_equal(straight[0].tokens, straight[1].tokens)
    # Another seed is another order; another batch size cuts the same stream.
    config = dataclasses.replace(packed.config, shuffle_seed=5)
    other = Loader(dataclasses.replace(packed, config=config), BATCH).host_batch(0)
    assert not np.array_equal(other.tokens, straight[0].tokens)
    wide = Loader(packed, 3 * BATCH).host_batch(1)
    joined = [np.concatenate(parts) for parts in zip(*straight[3:6], strict=True)]
    assert_equal(wide, type(wide)(*joined))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"fsdp": 8}, {"data": 8, "fsdp": 1}])
def test_processes_read_their_rows_of_one_batch(packed, count, axes):
    """Each process's devices are given their part; together they hold the batch of one process."""
    loader = Loader(packed, BATCH)
    whole = loader.host_batch(2)
    indices = sharding(**axes).devices_indices_map((BATCH, SEQ_LEN))
    devices = sorted(indices, key=lambda device: device.id)
    seen = set()
    for process in range(count):
        own = devices[process * 8 // count : (process + 1) * 8 // count]
        rows = rows_of([indices[device] for device in own], BATCH)
        assert_equal(loader.host_batch(2, rows), type(whole)(*(a[rows] for a in whole)))
        seen.update(rows.tolist())
        if "tensor" not in axes:
            assert len(rows) == BATCH // count
    assert seen == set(range(BATCH))


@pytest.mark.parametrize(
    "axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8, "fsdp": 1}, {"tensor": 8}]
)
def test_the_batch_is_the_same_on_every_mesh(packed, axes):
    given = sharding(**axes)
    loader = Loader(packed, BATCH, given)
    batch = loader.batch(4)
    assert_equal(batch, loader.host_batch(4))
    for array in batch:
        assert array.sharding == given
        assert array.committed
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(array)[shard.index])


def test_zigzag_by_hand():
    assert zigzag(8, 1).tolist() == list(range(8))
    assert zigzag(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag(12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]


@pytest.mark.parametrize("axes", [{"context": 4}, {"context": 2, "tensor": 2}, {"context": 8}])
def test_a_sequence_split_over_devices_is_in_zigzag_order(packed, axes):
    """Every device's tokens, targets and all else are its two chunks of the natural rows."""
    given = sharding(**axes)
    loader = Loader(packed, BATCH, given)
    natural, shards = loader.host_batch(3), axes["context"]
    chunk = SEQ_LEN // (2 * shards)
    for array, whole in zip(loader.batch(3), natural, strict=True):
        assert array.sharding == given
        for shard in array.addressable_shards:
            rows, tokens = shard.index
            number = (tokens.start or 0) // (2 * chunk)
            low = whole[rows, number * chunk :][:, :chunk]
            high = whole[rows, (2 * shards - 1 - number) * chunk :][:, :chunk]
            np.testing.assert_array_equal(shard.data, np.concatenate([low, high], axis=1))


def test_held_out_rows_are_in_zigzag_order_too(packed):
    (stored,), (natural,) = (
        list(Loader(packed, BATCH, given).held_out(1)) for given in (sharding(context=2), None)
    )
    order = zigzag(SEQ_LEN, 2)
    assert_equal(stored, type(natural)(*(np.asarray(x)[:, order] for x in natural)))


def test_sources_are_mixed_by_weight(packed):
    loader = Loader(packed, 64)
    drawn = np.concatenate([loader.locate(step)[0] for step in range(64)])
    assert (drawn == 1).sum() == round(4096 / 3)


def test_held_out_rows_come_once_and_first(packed):
    loader = Loader(packed, BATCH, sharding(fsdp=8))
    total = sum(map(len, packed.eval))
    batches = list(loader.held_out(100))
    assert len(batches) == -(-total // BATCH)
    filled = [row for batch in batches for row in np.asarray(batch.segments).any(axis=1)]
    assert sum(filled) == total
    rows = {tuple(row) for batch in batches for row in np.asarray(batch.tokens).tolist()}
    assert len(rows - {(packed.tokenizer.pad_id,) * SEQ_LEN}) == total
    tokens = sum(int((np.asarray(batch.segments) > 0).sum()) for batch in batches)
    assert tokens == sum(manifest.eval.tokens for manifest in packed.manifests)
    for again in (loader, Loader(packed, BATCH)):
        (first,) = again.held_out(1)
        assert_equal(first, batches[0])
    trained = {tuple(row) for step in range(60) for row in loader.host_batch(step).tokens.tolist()}
    assert not rows & trained


def test_nothing_held_out(packed, tmp_path):
    config = corpus.config(tmp_path, eval_fraction=0.0)
    with pytest.raises(UserError, match=r"nothing is held out at data.eval_fraction=0"):
        next(Loader(prepare(config, SEQ_LEN), BATCH).held_out(1))


def test_too_little_text_for_a_batch(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("x" * 100)
    config = corpus.config(tmp_path, sources=(Source("text", str(path)),))
    with pytest.raises(UserError, match="2 training rows of 64 tokens, too few for batch_size=8"):
        Loader(prepare(config, SEQ_LEN), 8)


def test_batches_are_made_ahead(packed):
    loader = Loader(packed, BATCH)
    with loader.batches(0) as batches:
        next(batches)
        time.sleep(0.3)
        next(batches)
        assert batches.step == 2
        assert batches.wait_s < 0.1
        loader.host_batch = lambda step, rows: time.sleep(0.3) or Loader(packed, 8).host_batch(step)
        for _ in range(4):  # Two are ready and one is being made.
            next(batches)
        assert batches.wait_s > 0.1


def test_an_error_of_the_thread_is_raised_at_its_step(packed):
    loader = Loader(packed, BATCH)
    made = loader.host_batch

    def fail(step, rows):
        if step == 3:
            raise OSError("the disk is gone")
        return made(step, rows)

    loader.host_batch = fail
    batches = loader.batches(1)
    assert_equal(next(batches), made(1))
    assert_equal(next(batches), made(2))
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "jaxgen-data"]


def test_the_thread_ends(packed):
    assert not data_threads()
    assert len(list(Loader(packed, BATCH).batches(0, 3))) == 3
    assert not data_threads()
    with Loader(packed, BATCH).batches(0) as batches:
        next(batches)
        assert data_threads()
    assert not data_threads()
    batches = Loader(packed, BATCH).batches(0)
    next(batches)
    del batches
    gc.collect()
    assert not data_threads()
