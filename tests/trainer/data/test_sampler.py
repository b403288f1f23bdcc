"""Laws of the sampler, for any number of rows, ranks and batch sizes."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dsft_api.conditions import FailureClass
from dsft_trainer.data.sampler import (
    GlobalBatches,
    Member,
    eval_batches,
    mixed,
    permutation,
    quotas,
    split,
    split_eval,
)
from dsft_trainer.errors import TrainerError

sizes = st.integers(1, 300)
seeds = st.integers(0, 2**31 - 1)
few = st.integers(1, 9)


@given(n=sizes, seed=seeds, epoch=st.integers(0, 1000))
def test_a_permutation_holds_every_index_once(n, seed, epoch):
    assert sorted(permutation(seed, epoch, n)) == list(range(n))


def test_the_order_is_pinned():
    """A run resumed by a later version must find its rows where it left them."""
    assert permutation(42, 0, 10).tolist() == [0, 1, 4, 2, 6, 8, 5, 9, 7, 3]
    assert permutation(42, 1, 10).tolist() != permutation(42, 0, 10).tolist()
    assert permutation(43, 0, 10).tolist() != permutation(42, 0, 10).tolist()


@given(n=sizes, batch=st.integers(1, 50), seed=seeds)
def test_an_epoch_repeats_no_row_and_drops_less_than_a_batch(n, batch, seed):
    if n < batch:
        return
    batches = GlobalBatches(n, batch, seed)
    seen = np.concatenate([batches.batch(step) for step in range(batches.steps_per_epoch)])
    assert len(set(seen.tolist())) == len(seen)
    assert 0 <= n - len(seen) < batch


@given(n=sizes, batch=st.integers(1, 50), seed=seeds, step=st.integers(0, 10_000))
def test_any_step_can_be_asked_for_directly(n, batch, seed, step):
    if n < batch:
        return
    batches = GlobalBatches(n, batch, seed)
    epoch = step // batches.steps_per_epoch
    position = step % batches.steps_per_epoch * batch
    assert batches.batch(step).tolist() == permutation(seed, epoch, n)[position : position + batch].tolist()


members = st.lists(st.builds(Member, st.integers(1, 60), st.floats(0.01, 100)), min_size=2, max_size=5).map(tuple)


@given(members=members)
def test_an_epoch_of_a_mixture_has_as_many_samples_as_rows_shared_by_weight(members):
    counts, rows = quotas(members), sum(member.rows for member in members)
    assert sum(counts) == rows
    total = sum(member.weight for member in members)
    assert all(abs(count - rows * member.weight / total) < 1 for count, member in zip(counts, members, strict=True))


@given(members=members, seed=seeds)
def test_no_row_of_a_member_comes_again_before_all_others_of_it(members, seed):
    assume(min(quotas(members)) > 0)
    order = np.concatenate([mixed(seed, epoch, members) for epoch in range(4)])
    first = 0
    for member, count in zip(members, quotas(members), strict=True):
        drawn = order[(order >= first) & (order < first + member.rows)] - first
        assert len(drawn) == 4 * count
        for begin in range(0, len(drawn), member.rows):
            one_pass = drawn[begin : begin + member.rows]
            assert len(set(one_pass.tolist())) == len(one_pass)
        first += member.rows


def test_the_order_of_a_mixture_is_pinned():
    """A run resumed by a later version must find its samples where it left them."""
    few_and_many = (Member(3, 1.0), Member(7, 1.0))
    assert mixed(42, 0, few_and_many).tolist() == [8, 1, 7, 2, 0, 5, 1, 4, 0, 3]
    assert mixed(42, 1, few_and_many).tolist() == [2, 2, 6, 9, 4, 5, 1, 0, 9, 1]


def test_any_step_of_a_mixture_can_be_asked_for_directly():
    two = (Member(30, 3.0), Member(14, 1.0))
    batches = GlobalBatches(44, 8, 7, two)
    assert batches.steps_per_epoch == 5
    assert batches.batch(13).tolist() == mixed(7, 2, two)[24:32].tolist()


def test_a_member_without_a_sample_is_refused_by_name():
    with pytest.raises(
        TrainerError, match=r"spec\.data\.mixture\[1\]\.weight 0\.001 gives it no sample in an epoch of 44"
    ):
        GlobalBatches(44, 8, 7, (Member(30, 3.0), Member(14, 0.001)))


@given(n=sizes, batch=st.integers(1, 50), seed=seeds, data=st.data())
def test_groups_by_length_hold_the_same_rows_of_an_epoch(n, batch, seed, data):
    if n < batch:
        return
    lengths = np.array(data.draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)))
    plain, by_length = GlobalBatches(n, batch, seed), GlobalBatches(n, batch, seed, lengths=lengths)
    for epoch in range(2):
        steps = range(epoch * plain.steps_per_epoch, (epoch + 1) * plain.steps_per_epoch)
        rows, same_rows = (np.concatenate([batches.batch(step) for step in steps]) for batches in (plain, by_length))
        assert sorted(rows) == sorted(same_rows)
        assert lengths[by_length.batch(steps.start)].max() == lengths[rows].max()


def test_groups_by_length_leave_little_to_pad_and_stay_random():
    lengths = np.random.default_rng(0).lognormal(5, 1, 10_000).clip(4, 2048).astype(np.int64)
    batches = GlobalBatches(len(lengths), 64, 7, lengths=lengths)

    def efficiency(batches: GlobalBatches) -> float:
        micro = np.concatenate([batches.batch(step).reshape(-1, 4) for step in range(batches.steps_per_epoch)])
        return lengths[micro].sum() / (lengths[micro].max(axis=1).sum() * 4)

    assert efficiency(batches) > 0.95 > 0.55 > efficiency(GlobalBatches(len(lengths), 64, 7))
    # Short and long ones take turns: which batch comes when says nothing of its length.
    means = [lengths[batches.batch(step)].mean() for step in range(1, batches.steps_per_epoch)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2
    first, second = ({frozenset(batches.batch(step + epoch).tolist()) for step in range(156)} for epoch in (0, 156))
    assert not first & second


def test_the_order_of_groups_is_pinned():
    """A run resumed by a later version must find its rows where it left them."""
    lengths = np.array([5, 1, 4, 4, 2, 9, 3, 3, 7, 8])
    batches = GlobalBatches(10, 3, 42, lengths=lengths)
    assert [batches.batch(step).tolist() for step in range(4)] == [[5, 9, 8], [0, 2, 6], [7, 4, 1], [5, 9, 8]]


@given(world=few, micro=few, accumulation=few)
def test_ranks_share_a_global_batch_without_gap_or_overlap(world, micro, accumulation):
    batch = GlobalBatches(1000, world * micro * accumulation, seed=7).batch(3)
    shares = [split(batch, rank, world, micro) for rank in range(world)]
    assert {len(share) for share in shares} == {accumulation}
    assert {len(rows) for share in shares for rows in share} == {micro}
    assert sorted(np.concatenate([rows for share in shares for rows in share])) == sorted(batch)


@given(n=sizes, world=few, batch=few)
def test_evaluation_counts_every_row_once_in_equally_many_batches(n, world, batch):
    ranks = [eval_batches(n, rank, world, batch) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(indices) for batches in ranks for indices, _ in batches} == {batch}
    counted = np.concatenate([indices[valid] for batches in ranks for indices, valid in batches])
    assert sorted(counted) == list(range(n))
    assert all(indices.max() < n for batches in ranks for indices, _ in batches)


@given(n=st.integers(2, 300), fraction=st.floats(0.001, 0.5), seed=seeds)
def test_the_hold_out_parts_the_rows(n, fraction, seed):
    table = pa.table({"text": pa.array(range(n))})
    try:
        train, held_out = split_eval(table, fraction, seed)
    except TrainerError:
        pytest.fail("there are enough rows")
    assert sorted(train["text"].to_pylist() + held_out["text"].to_pylist()) == list(range(n))
    assert held_out.num_rows == max(1, round(n * fraction))
    assert split_eval(table, fraction, seed)[1].equals(held_out)


def test_a_single_row_cannot_be_held_out():
    with pytest.raises(TrainerError, match=r"evalFraction 0\.5 holds out all of the 1 rows") as caught:
        split_eval(pa.table({"text": ["a"]}), 0.5, seed=0)
    assert caught.value.failure_class is FailureClass.DATA_INVALID


def test_too_few_rows_name_both_numbers_and_the_way_out():
    with pytest.raises(TrainerError, match=r"12 rows, fewer than spec\.training\.globalBatchSize 16") as caught:
        GlobalBatches(12, 16, seed=0)
    assert caught.value.failure_class is FailureClass.DATA_INVALID
    assert caught.value.remedy == "lower globalBatchSize to 12 or less, or add rows"


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(TrainerError, match="globalBatchSize 64 is not a multiple of 24 ranks") as caught:
        split(np.arange(64), 0, 24, 1)
    assert caught.value.failure_class is FailureClass.CONFIG_INVALID
