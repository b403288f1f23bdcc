"""How a global batch is cut over ranks, and what is said when it cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsft_api.batch import BatchError, BatchPlan, plan_batch


@pytest.mark.parametrize(
    ("global_batch", "ranks", "micro", "steps"),
    [(64, 8, 1, 8), (64, 8, 8, 1), (64, 1, 1, 64), (1, 1, 1, 1), (96, 3, 4, 8)],
)
def test_a_batch_that_divides_is_accumulated(global_batch, ranks, micro, steps):
    assert plan_batch(global_batch, ranks, micro) == BatchPlan(ranks, micro, steps)


REFUSALS = [
    (
        (64, 24, 1, 8),
        "globalBatchSize 64 cannot be divided by 24 ranks x microBatchSize 1; "
        "rank counts that fit: 1, 2, 4, 8, 16, 32, 64 (with 8 GPUs per node: 1, 2, 4, 8 nodes); "
        "or set globalBatchSize to 48 or 72",
    ),
    (
        (64, 8, 16, 1),
        "globalBatchSize 64 cannot be divided by 8 ranks x microBatchSize 16; rank counts that fit: 1, 2, 4; "
        "or set microBatchSize to 1, 2, 4 or 8; or set globalBatchSize to 128",
    ),
    (
        (10, 4, 3, 4),
        "globalBatchSize 10 cannot be divided by 4 ranks x microBatchSize 3; set globalBatchSize to 12",
    ),
    (
        (12, 5, 2, 5),
        "globalBatchSize 12 cannot be divided by 5 ranks x microBatchSize 2; rank counts that fit: 1, 2, 3, 6; "
        "or set globalBatchSize to 10 or 20",
    ),
]


@pytest.mark.parametrize(("numbers", "message"), REFUSALS)
def test_a_batch_that_does_not_divide_is_refused_with_what_would(numbers, message):
    with pytest.raises(BatchError) as raised:
        plan_batch(*numbers)
    assert str(raised.value) == message


def test_long_lists_show_what_is_near():
    with pytest.raises(BatchError) as raised:
        plan_batch(720720, 17, 1)
    assert "rank counts that fit: 10, 11, 12, 13, 14, 15, 16, 18, 20, 21, 22, 24; " in raised.value.remedy
    assert len(raised.value.rank_counts) == 240


def refused(global_batch: int, ranks: int, micro: int) -> BatchError | None:
    try:
        assert plan_batch(global_batch, ranks, micro).global_batch_size == global_batch
    except BatchError as error:
        return error
    return None


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 64))
def test_every_number_in_the_advice_works(global_batch, ranks, micro):
    if error := refused(global_batch, ranks, micro):
        assert error.global_batch_sizes
        assert not any(refused(global_batch, count, micro) for count in error.rank_counts)
        assert not any(refused(global_batch, ranks, size) for size in error.micro_batch_sizes)
        assert not any(refused(size, ranks, micro) for size in error.global_batch_sizes)
