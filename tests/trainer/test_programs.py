"""The programs of examples/programs: each loses a rank once, goes on from its commit, and has DeepSpeed's stage 3 in charge.

Their manifests are those of the examples, with tiny models and data of the tests.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass, Phase
from dsft_cli.follow import read_status
from dsft_trainer.checkpoint.ray_book import LEDGER
from tests.trainer.program_examples import EXAMPLES, PROBED, RANKS, Length, examples, manifest, put_assets
from tests.trainer.runs import PATIENCE_SECONDS, Run, ranks, wait_until

LENGTH = Length(commits=8)
PROGRAMS = examples(LENGTH)
# One that calls DeepSpeed, and one that has a framework do it.
QUICK = ("deepspeed_torch", "transformers_trainer")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_assets(tmp_path_factory.mktemp("assets"), LENGTH)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.drill) for name in PROGRAMS]
)
def test_a_program_loses_a_rank_and_goes_on_from_its_commit(
    name: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(EXAMPLES), str(PROBED), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    probe = tmp_path / "probe"
    probe.mkdir()
    document = manifest(name, LENGTH, assets)
    document["spec"]["program"]["config"]["probed"]["out"] = str(probe)
    run = Run(document, tmp_path / "run")
    with run.started("ray", workers=RANKS) as process:

        def found(fact: object) -> bool:
            assert process.poll() is None, run.log_tail()
            return bool(fact)

        wait_until(lambda: found(len(ranks(process)) == RANKS), "the ranks")
        _, victim = ranks(process)
        wait_until(lambda: found(run.store.get_bytes(LEDGER)), "a commit")
        victim.kill()
        code = process.wait(PATIENCE_SECONDS)
    assert code == 0, run.log_tail()

    status = read_status(run.local())
    assert status is not None
    assert status.phase is Phase.SUCCEEDED
    (attempt,) = status.attempts
    assert [loss.failure_class for loss in attempt.losses] == [FailureClass.WORKER_LOST]
    assert status.checkpoints is not None
    # None twice: what was committed was not trained again.
    assert [ref.step for ref in status.checkpoints.retained] == LENGTH.committed
    # Each rank had its own part of the data.
    assert status.checkpoints.retained[-1].epoch == LENGTH.commits
    losses = [ref.metrics["loss"] for ref in status.checkpoints.retained]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    facts = [json.loads((probe / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for fact in facts:
        assert (fact["stage"], fact["steps"], fact["whole"]) == (3, LENGTH.committed[-1], [])
        assert fact["parameters"]
        assert all(share == math.ceil(whole / RANKS) for whole, share in fact["parameters"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_few_lines_are_there_for_dsft_and_the_page_says_how_many(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    lines = [line for line in text.splitlines() if line.endswith("# dsft")]
    assert len(lines) == PROGRAMS[name].lines
    code = re.sub(r'"""[\s\S]*?"""', "", text)
    assert [line for line in code.splitlines() if "dsft_trainer" in line and line not in lines] == []
    page = (EXAMPLES.parents[1] / "docs" / "programs.md").read_text()
    (row,) = [line for line in page.splitlines() if f"`{name}.py`" in line and line.startswith("|")]
    assert row.split("|")[3].strip() == str(len(lines))


def test_each_example_is_tried_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == PROGRAMS.keys()
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == PROGRAMS.keys()
