"""Several data sets, each in its own format, become one; what is wrong with one of them is told by its place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsft_api.job import Job
from dsft_trainer.data.prepare import Prepared, open_prepared, tokenize_here
from dsft_trainer.data.tokens import IGNORED
from dsft_trainer.errors import TrainerError
from dsft_trainer.preflight import _check_data
from tests.trainer import tiny
from tests.trainer.runs import causal_lm, first_attempt


def job_on(*members: dict[str, Any], **data: Any) -> Job:
    document = causal_lm("mixed", Path("/model"), Path("/text"), steps=1)["spec"]
    document["data"] = {"mixture": list(members), "maxLength": 64, **data}
    return first_attempt(document)


def member(folder: Path, data_format: str, count: int, weight: float = 1.0) -> dict[str, Any]:
    return {"uri": tiny.dataset(folder, data_format, count).as_uri(), "format": data_format, "weight": weight}


def prepared(job: Job, folder: Path) -> Prepared:
    return open_prepared(tokenize_here(job, tiny.tokenizer(chat_template=tiny.CHATML), folder))


def test_each_member_is_read_by_its_own_format(tmp_path: Path) -> None:
    job = job_on(
        member(tmp_path, "text", 20), member(tmp_path, "prompt_completion", 12), member(tmp_path, "messages", 4)
    )
    data = prepared(job, tmp_path / "tokens")
    assert (len(data.train), data.train.parts, data.eval) == (36, (20, 12, 4), None)
    # Whole texts are trained, of prompts and chats a part.
    trained = [bool((data.train[row]["labels"] != IGNORED).all()) for row in range(36)]
    assert trained == [True] * 20 + [False] * 16


def test_batches_hold_each_member_by_its_weight(tmp_path: Path) -> None:
    job = job_on(member(tmp_path, "text", 20, 3.0), member(tmp_path, "prompt_completion", 60))
    batches = prepared(job, tmp_path / "tokens").batches(job.spec.workload())
    drawn = np.concatenate([batches.batch(step) for step in range(batches.steps_per_epoch)])
    assert len(drawn) == 80
    # Three quarters of 80 samples from 20 rows: each of them three times.
    assert np.bincount(drawn, minlength=80)[:20].tolist() == [3] * 20
    assert np.bincount(drawn, minlength=80)[20:].sum() == 20


def test_each_member_is_packed_by_itself(tmp_path: Path) -> None:
    members = member(tmp_path, "text", 20), member(tmp_path, "prompt_completion", 12)
    rows = prepared(job_on(*members), tmp_path / "rows").train
    packed = prepared(job_on(*members, packing=True), tmp_path / "packed").train
    assert [0 < few < many for few, many in zip(packed.parts, rows.parts, strict=True)] == [True, True]
    first, cut = packed.parts[0], rows.parts[0]
    assert packed.weights[:first].sum() == rows.weights[:cut].sum()
    assert packed.weights[first:].sum() == rows.weights[cut:].sum()


def test_a_share_of_each_member_is_held_out(tmp_path: Path) -> None:
    job = job_on(member(tmp_path, "text", 20), member(tmp_path, "prompt_completion", 10), evalFraction=0.2)
    data = prepared(job, tmp_path / "tokens")
    assert data.eval is not None
    assert (data.train.parts, data.eval.parts) == ((16, 8), (4, 2))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"txt": "a"}, r"spec\.data\.mixture\[1\]\.columns\.text"),
        ({"text": None}, r"spec\.data\.mixture\[1\]: .*column text is empty"),
        ({"text": 7}, r"spec\.data\.mixture\[1\]"),
    ],
)
def test_errors_name_the_member(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", [row, row]).as_uri()
    job = job_on(member(tmp_path, "text", 20), {"uri": bad, "format": "text"})
    with pytest.raises(TrainerError) as caught:
        _check_data(job, tmp_path)
    assert caught.match(told)


def test_too_small_a_weight_is_seen_before_anything_starts(tmp_path: Path) -> None:
    job = job_on(member(tmp_path, "text", 20), member(tmp_path, "prompt_completion", 12, 0.0001))
    with pytest.raises(TrainerError, match=r"mixture\[1\]\.weight 0\.0001 gives it no sample"):
        _check_data(job, tmp_path)
