"""The same tokens by Ray Data: rows are encoded in parallel over the cluster.

Only who encodes differs from `tokens.tokenize`. The result is put in order, written to the same file and dealt out by the
same sampler, so the loader cannot change a run's loss curve.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_trainer.data.formats import EVAL_FIELD, TRAIN_FIELD
from dsft_trainer.data.sources import fetch
from dsft_trainer.data.tokens import ROWS_PER_CALL, Encoder, set_chat_template
from dsft_trainer.errors import TrainerError

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

# Travels with each block: the number of each row, by which blocks are put in order and errors name the row.
_ROW = "row"
# A worker's refusal comes back as data, since Ray Data hands on only the text of an exception.
_REFUSAL = "refusal"


def tokenize_with_ray(table: pa.Table, encoder: Encoder) -> "Dataset":
    """A lazy Ray data set of the tokens, for `collect`. Needs `ray.init`."""
    import ray.data

    numbered = table.append_column(_ROW, pa.array(range(table.num_rows), pa.int64()))
    starts = range(0, table.num_rows, ROWS_PER_CALL)
    blocks = ray.data.from_arrow([numbered.slice(start, ROWS_PER_CALL).combine_chunks() for start in starts])
    return blocks.map_batches(_encode, batch_size=None, batch_format="pyarrow", fn_args=(encoder,))


def tokenized_datasets(job: Job) -> "dict[str, Dataset]":
    """The run's data sets as tokens, `train` and, where there is one, `eval`; computed once, for all nodes.

    Raises:
        TrainerError: whatever is wrong with model, data or chat template.
    """
    from dsft_trainer.data.prepare import load
    from dsft_trainer.model import load_tokenizer

    model, data, storage = job.spec.model, job.spec.data, job.spec.storage
    if model is None or data is None or data.train is None:
        raise TrainerError(FailureClass.CONFIG_INVALID, "loader ray-data needs spec.model and spec.data.train")
    with tempfile.TemporaryDirectory(prefix="dsft-data-") as folder:
        cache = Path(folder)
        rows = load(job, cache)
        tokenizer = load_tokenizer(
            fetch(model.uri, storage=storage, cache=cache, kind="tokenizer", revision=model.revision)
        )
        set_chat_template(tokenizer, data.chat_template, storage=storage, cache=cache)
    encoder = Encoder.of(data.train, data, tokenizer)
    tokens = {"train": tokenize_with_ray(rows.train, encoder).materialize()}
    if rows.eval is not None:
        encoder = Encoder.of(rows.eval_source, data, tokenizer, EVAL_FIELD if data.eval else TRAIN_FIELD)
        tokens["eval"] = tokenize_with_ray(rows.eval, encoder).materialize()
    return tokens


def collect(tokens: "Dataset | DataIterator") -> pa.Table:
    """Run it, and return exactly what `tokens.tokenize` returns.

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
