"""The same tokens by Ray Data: rows are encoded in parallel over the cluster.

Only who encodes differs from `tokens.tokenize`. The result is put in order, written to the same file and dealt out by the
same sampler, so the loader cannot change a run's loss curve.
"""

from typing import TYPE_CHECKING

import pyarrow as pa

from dsft_api.conditions import FailureClass
from dsft_trainer.data.tokens import ROWS_PER_CALL, Encoder
from dsft_trainer.errors import TrainerError

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset, MaterializedDataset

# Travels with each block: the number of each row, by which blocks are put in order and errors name the row.
_ROW = "row"
# A worker's refusal comes back as data, since Ray Data hands on only the text of an exception.
_REFUSAL = "refusal"


def tokenize_with_ray(table: pa.Table, encoder: Encoder) -> "MaterializedDataset":
    """A Ray data set of the tokens, for `collect`. Needs `ray.init`, and CPUs that no rank holds yet.

    Computed now and once: left to the ranks, every node would compute it again, on CPUs that its ranks have taken.
    """
    import ray.data

    numbered = table.append_column(_ROW, pa.array(range(table.num_rows), pa.int64()))
    starts = range(0, table.num_rows, ROWS_PER_CALL)
    blocks = ray.data.from_arrow([numbered.slice(start, ROWS_PER_CALL).combine_chunks() for start in starts])
    tokens = blocks.map_batches(_encode, batch_size=None, batch_format="pyarrow", fn_args=(encoder,))
    return tokens.materialize()


def collect(tokens: "Dataset | DataIterator") -> pa.Table:
    """Bring the tokens here: exactly what `tokens.tokenize` returns, in a process that may be another one.

    Raises:
        TrainerError: as `tokens.tokenize`.
    """
    blocks = list(tokens.iter_batches(batch_size=None, batch_format="pyarrow"))
    blocks.sort(key=lambda block: block[_ROW][0].as_py())
    for block in blocks:
        if _REFUSAL in block.column_names:
            message, remedy = block[_REFUSAL][0].as_py()
            raise TrainerError(FailureClass.DATA_INVALID, message, remedy)
    return pa.concat_tables([block.drop_columns([_ROW]) for block in blocks])


def _encode(rows: pa.Table, encoder: Encoder) -> pa.Table:
    first_row = rows[_ROW][0].as_py()
    try:
        tokens = encoder.encode(rows.drop_columns([_ROW]), first_row)
    except TrainerError as error:
        return pa.table({_ROW: [first_row], _REFUSAL: [[error.message, error.remedy]]})
    return tokens.append_column(_ROW, rows[_ROW])
