"""Ray Data makes the same tokens, row for row, and the same errors."""

import pyarrow as pa
import pytest
import ray

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import DataSpec
from dsft_trainer.data import tokens
from dsft_trainer.data.ray_data import collect, tokenize_with_ray
from dsft_trainer.errors import TrainerError
from tests.trainer import tiny


@pytest.fixture(scope="module", autouse=True)
def ray_on_this_machine():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
def test_ray_data_equals_the_torch_loader():
    data = DataSpec.model_validate({"train": {"uri": "file:///data", "format": "messages"}, "loader": "ray-data"})
    encoder = tokens.Encoder.of(data.train, data, tiny.tokenizer(chat_template=tiny.CHATML))
    good = tiny.rows("messages", 2500)
    table = pa.Table.from_pylist(good)
    expected = tokens.tokenize(table, encoder)
    # A rank gets an iterator of its own.
    collected = collect(tokenize_with_ray(table, encoder).iterator())
    assert collected.schema == expected.schema
    assert collected.equals(expected)

    long = [{"role": "user", "content": "x " * 600}, {"role": "assistant", "content": "y"}]
    with pytest.raises(TrainerError, match=r"row 2400 of spec\.data\.train has nothing to train on") as caught:
        collect(tokenize_with_ray(pa.Table.from_pylist([*good[:2400], {"messages": long}]), encoder))
    assert caught.value.failure_class is FailureClass.DATA_INVALID
