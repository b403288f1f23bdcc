"""Where a row is cut into a prompt and what should follow; the texts themselves are tried in test_tasks."""

import numpy as np
import pytest

from dsft_trainer.data.tokens import IGNORED
from dsft_trainer.samples import split_row

_ = IGNORED


@pytest.mark.parametrize(
    ("ids", "labels", "prompt", "expected"),
    [
        pytest.param([1, 5, 6, 7, 2], [_, _, _, 7, 2], [1, 5, 6], [7, 2], id="prompt and completion"),
        pytest.param([1, 5, 6, 2, 8, 7, 2], [_, _, 6, 2, _, 7, 2], [1, 5], [6, 2], id="chat: up to the first answer"),
        pytest.param([1, 5, 6, 7, 2], [1, 5, 6, 7, 2], [1, 5], [6, 7, 2], id="all of a text is trained"),
        pytest.param([1, 2], [1, 2], [1], [2], id="the shortest text"),
        pytest.param([9, 5, 6, 2, 8, 4], [9, 5, 6, 2, _, 4], [9, 5, 6], [2], id="begins with what is trained"),
    ],
)
def test_a_prompt_ends_where_training_begins(
    ids: list[int], labels: list[int], prompt: list[int], expected: list[int]
) -> None:
    row = {"input_ids": np.array(ids, np.int32), "labels": np.array(labels, np.int32)}
    assert [part.tolist() for part in split_row(row)] == [prompt, expected]
