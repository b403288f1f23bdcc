"""Packed rows: which go together, what they count in the loss, and how little padding is left."""

import numpy as np
import pyarrow as pa
import pytest

from dsft_trainer.data.collate import Collator
from dsft_trainer.data.indexed import open_indexed, write_indexed
from dsft_trainer.data.packing import best_fit, pack
from dsft_trainer.data.tokens import IGNORED

LENGTHS = [
    # lengths, capacity -> rows of each sequence
    ([3, 5, 2, 4], 8, [[1, 0], [3, 2]]),
    ([8, 8], 8, [[0], [1]]),
    ([1, 1, 1], 8, [[0, 1, 2]]),
    # The smallest room that is enough, not the first: 2 goes beside 6 and not beside 5.
    ([5, 6, 2], 8, [[1, 2], [0]]),
    ([4, 4, 4], 8, [[0, 1], [2]]),
]


@pytest.mark.parametrize(("lengths", "capacity", "expected"), LENGTHS)
def test_each_row_goes_where_the_least_room_is_left(lengths, capacity, expected):
    assert best_fit(np.array(lengths), capacity) == expected


def tokens(lengths, rng) -> pa.Table:
    """Rows of random tokens, of which the first third is not trained."""
    ids = [rng.integers(3, 500, length).astype(np.int32) for length in lengths]
    labels = [np.where(np.arange(len(row)) < len(row) // 3, IGNORED, row).astype(np.int32) for row in ids]
    kind = pa.list_(pa.int32())
    weights = pa.array([int((row[1:] != IGNORED).sum()) for row in labels], pa.int64())
    return pa.table({"input_ids": pa.array(ids, kind), "labels": pa.array(labels, kind), "weight": weights})


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_rows_stay_whole_and_count_what_they_counted(rng):
    rows = tokens(rng.integers(1, 60, 200), rng)
    packed = pack(rows, 64).to_pylist()
    cut = []
    for sequence in packed:
        assert len(sequence["input_ids"]) == len(sequence["labels"]) == len(sequence["position_ids"]) <= 64
        begins = [at for at, position in enumerate(sequence["position_ids"]) if position == 0]
        for begin, end in zip(begins, [*begins[1:], len(sequence["input_ids"])], strict=True):
            assert sequence["position_ids"][begin:end] == list(range(end - begin))
            # No token of one row is the target of another.
            assert sequence["labels"][begin] == IGNORED
            cut.append((sequence["input_ids"][begin:end], sequence["labels"][begin + 1 : end]))
        assert sequence["weight"] == sum(label != IGNORED for label in sequence["labels"])
    whole = [(row["input_ids"], row["labels"][1:]) for row in rows.to_pylist()]
    assert sorted(cut) == sorted(whole)
    assert sum(sequence["weight"] for sequence in packed) == sum(rows["weight"].to_pylist())


def test_positions_are_those_of_the_longest_row(rng, tmp_path):
    rows = tokens([40, 20, 4], rng)
    write_indexed([rows], tmp_path / "rows")
    write_indexed([pack(rows, 64)], tmp_path / "packed")
    assert open_indexed(tmp_path / "rows").positions == 40
    packed = open_indexed(tmp_path / "packed")
    assert (int(packed.lengths.max()), packed.positions) == (64, 40)


def test_packing_is_the_same_each_time_and_in_whatever_portions_rows_came(rng):
    rows = tokens(rng.integers(1, 60, 200), rng)
    in_portions = pa.concat_tables([rows.slice(0, 7), rows.slice(7, 100), rows.slice(107)])
    assert pack(in_portions, 64).equals(pack(rows, 64))


def test_a_batch_of_packed_rows_has_positions_and_no_mask(rng, tmp_path):
    write_indexed([pack(tokens([5, 3, 6], rng), 10)], tmp_path / "train.arrow")
    data = open_indexed(tmp_path / "train.arrow")
    batch = Collator(pad_token_id=0, task="causal-lm", max_length=512)([data[0], data[1]])
    assert set(batch.inputs) == {"input_ids", "position_ids"}
    assert batch.inputs["position_ids"].tolist() == [
        [*range(6), *range(3)],
        [*range(5), *[0] * 4],
    ]
    assert batch.weight == data.weights.sum()
    assert batch.tokens == 14


def test_skewed_lengths_leave_little_padding(rng, tmp_path, capsys):
    """Lognormal lengths, as in many chat data sets: median 200, a tenth above 700, cut at 2048."""
    lengths = np.clip(rng.lognormal(np.log(200), 1.0, 5000).astype(int), 4, 2048)
    rows = tokens(lengths, rng)
    efficiency = {}
    for name, table in (("packed", pack(rows, 2048)), ("padded", rows)):
        write_indexed([table], tmp_path / f"{name}.arrow")
        data = open_indexed(tmp_path / f"{name}.arrow")
        collator = Collator(pad_token_id=0, task="causal-lm", max_length=2048)
        order = np.random.default_rng(0).permutation(len(data))
        batches = [collator([data[int(row)] for row in order[at : at + 4]]) for at in range(0, len(order), 4)]
        efficiency[name] = sum(batch.tokens for batch in batches) / sum(batch.labels.numel() for batch in batches)
    with capsys.disabled():
        print(
            f" token efficiency in batches of 4: {efficiency['packed']:.3f} packed, {efficiency['padded']:.3f} padded "
        )
    assert efficiency["packed"] >= 0.95
    assert efficiency["packed"] > efficiency["padded"]
