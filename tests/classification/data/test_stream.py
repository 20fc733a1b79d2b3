"""The sample stream: exact epochs, the same for any number of processes, a pure function."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_backbone.classification.data.stream import SampleStream, sample_rng
from resnet_backbone.runtime.errors import DataError


def take(stream: SampleStream, iterations: int) -> np.ndarray:
    return np.concatenate([stream.batch(i)[0] for i in range(iterations)])


@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 5))
def test_every_sample_once_an_epoch(num_samples, batch_size, seed):
    epochs = 3
    iterations = -(-epochs * num_samples // batch_size)
    drawn = take(SampleStream(num_samples, batch_size, seed), iterations)
    for epoch in range(epochs):
        part = drawn[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part) == list(range(num_samples))


@given(st.integers(1, 40), st.sampled_from([2, 3, 4]), st.integers(1, 5))
def test_processes_share_each_batch(num_samples, world, local):
    whole = SampleStream(num_samples, world * local, seed=3)
    parts = [SampleStream(num_samples, world * local, 3, rank, world) for rank in range(world)]
    for iteration in range(5):
        joined = np.concatenate([part.batch(iteration)[0] for part in parts])
        np.testing.assert_array_equal(joined, whole.batch(iteration)[0])


def test_epochs_and_seeds_differ():
    stream = SampleStream(100, 100, seed=1)
    assert (stream.epoch_order(0) != stream.epoch_order(1)).any()
    assert (stream.epoch_order(0) != SampleStream(100, 100, seed=2).epoch_order(0)).any()


def test_a_batch_over_the_end_of_an_epoch_says_so():
    indices, epochs = SampleStream(5, 4, seed=0).batch(1)
    assert epochs.tolist() == [0, 1, 1, 1] and len(set(indices[1:])) == 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 4))
def test_shards_are_read_whole_and_neighbors_together(sizes, together):
    total = sum(sizes)
    groups = {"group_sizes": tuple(sizes), "groups_together": together}
    order = SampleStream(total, 1, seed=4, **groups).epoch_order(2)
    assert sorted(order) == list(range(total))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order]
    seen = list(dict.fromkeys(shard_of.tolist()))
    first = 0
    while seen:  # each run of `together` shards ends before the next one begins
        length = sum(sizes[shard] for shard in _first_group(shard_of[first:], sizes, together))
        group = set(shard_of[first : first + length].tolist())
        assert len(group) <= together
        assert not group & set(shard_of[first + length :].tolist())
        seen = [shard for shard in seen if shard not in group]
        first += length


def _first_group(shards, sizes, together):
    """The shards that fill the start of an order: the fewest samples that are whole shards."""
    group: set = set()
    for place, shard in enumerate(shards, start=1):
        group.add(int(shard))
        if len(group) <= together and sum(sizes[s] for s in group) == place:
            rest = set(shards[place:].tolist())
            if not group & rest and (len(group) == together or not rest):
                return group
    raise AssertionError("no whole group of shards at the start of the order")


def test_unshuffled_is_in_order():
    assert take(SampleStream(4, 2, shuffle=False), 4).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_pickled_stream_is_the_same_stream():
    stream = SampleStream(30, 4, seed=8)
    again = pickle.loads(pickle.dumps(stream))
    np.testing.assert_array_equal(again.epoch_order(3), stream.epoch_order(3))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (dict(num_samples=0, batch_size=4), "no samples"),
        (dict(num_samples=9, batch_size=4, world=3), "does not divide"),
        (dict(num_samples=9, batch_size=3, group_sizes=(4, 4)), "shards hold 8"),
    ],
)
def test_impossible_streams_are_refused(arguments, hint):
    with pytest.raises(DataError, match=hint):
        SampleStream(**arguments)


def test_augmentation_depends_on_seed_epoch_and_sample_alone():
    draw = [sample_rng(*key).random() for key in [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)]]
    assert len(set(draw)) == 4
    assert sample_rng(1, 2, 3).random() == draw[0]
