"""The order of rows in shards: each epoch has every row once, and no place in it needs the rows before it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsft_trainer.data.sampler import GlobalBatches
from dsft_trainer.data.shard_order import WINDOW, ShardOrder

orders = st.builds(ShardOrder, st.lists(st.integers(1, 9), min_size=1, max_size=40).map(tuple), st.integers(0, 99))


@given(order=orders, epoch=st.integers(0, 3))
def test_an_epoch_has_every_row_once(order: ShardOrder, epoch: int) -> None:
    assert sorted(order.rows_at(epoch, 0, order.n).tolist()) == list(range(order.n))


@given(order=orders, epoch=st.integers(0, 3), data=st.data())
def test_any_place_can_be_asked_for_directly(order: ShardOrder, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, order.n - 1))
    stop = data.draw(st.integers(start + 1, order.n))
    rows = order.rows_at(epoch, start, stop)
    assert rows.tolist() == order.rows_at(epoch, 0, order.n)[start:stop].tolist()
    needed = {order.shard_of(int(row))[0] for row in rows}
    assert needed <= set(order.shards_at(epoch, start, stop))


@given(order=orders, row=st.integers(0, 10_000))
def test_a_row_is_found_in_its_shard(order: ShardOrder, row: int) -> None:
    row %= order.n
    shard, place = order.shard_of(row)
    assert sum(order.rows[:shard]) + place == row
    assert 0 <= place < order.rows[shard]


def test_few_shards_are_needed_at_a_time_and_the_next_ones_are_known() -> None:
    order = ShardOrder((100,) * 50, seed=7)
    batches = GlobalBatches(order.n, 64, 7, shards=order)
    ahead = [set(batches.shards_ahead(step)) for step in range(batches.steps_per_epoch + 5)]
    assert max(map(len, ahead)) <= 3 * WINDOW
    for step in range(1, len(ahead)):
        needed = {order.shard_of(int(row))[0] for row in batches.batch(step)}
        # They were on their way a step before they were needed.
        assert needed <= ahead[step - 1]


def test_epochs_and_shards_differ_in_order() -> None:
    order = ShardOrder((5,) * 20, seed=7)
    first, second = (order.rows_at(epoch, 0, order.n).tolist() for epoch in (0, 1))
    assert first != second
    assert first != ShardOrder((5,) * 20, seed=8).rows_at(0, 0, order.n).tolist()
    # Rows of eight shards, not of one, stand together.
    assert len({order.shard_of(row)[0] for row in first[:10]}) > 3


def test_the_order_is_pinned() -> None:
    """A run resumed by a later version must find its rows where it left them."""
    assert ShardOrder((2, 3, 1), 42).rows_at(0, 0, 6).tolist() == [2, 1, 3, 0, 5, 4]
    order = ShardOrder((1,) * 10, 42)
    assert np.concatenate([order.rows_at(1, 0, 4), order.rows_at(1, 4, 10)]).tolist() == [4, 0, 3, 9, 8, 6, 1, 7, 2, 5]
