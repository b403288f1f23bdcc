"""A checkpoint that somebody asks for: when a save is made for it, when it counts as answered, and one in a real run."""

from pathlib import Path

import pytest

from dsft_trainer.checkpoint.requests import SaveRequests
from dsft_trainer.runtime.channel import Channel
from tests.trainer import tiny
from tests.trainer.runs import Run, causal_lm, wait_until

ENDLESS = 1_000_000


class Asked:
    """What rank 0 hears."""

    def __init__(self) -> None:
        self.value: str | None = None

    def __call__(self) -> str | None:
        return self.value


@pytest.fixture
def asked() -> Asked:
    return Asked()


def test_nobody_asks(asked: Asked) -> None:
    requests = SaveRequests(asked)
    requests.saved(3)
    requests.committed(3)
    assert (requests.vote(), requests.answered) == (0, None)


def test_one_save_for_each_value(asked: Asked) -> None:
    requests = SaveRequests(asked)
    asked.value = "one"
    assert requests.vote() == 1
    requests.saved(4)
    assert requests.vote() == 0, "a save is on its way"
    requests.committed(2)
    assert requests.answered is None, "that was the commit before"
    requests.committed(4)
    assert (requests.vote(), requests.answered) == (0, "one")
    asked.value = "two"
    assert requests.vote() == 1


def test_a_save_that_failed_is_made_up_for_by_the_next(asked: Asked) -> None:
    requests = SaveRequests(asked)
    asked.value = "one"
    requests.vote()
    requests.saved(4)
    assert requests.vote() == 0, "storage that fails is not asked at each step"
    requests.saved(8)
    requests.committed(8)
    assert requests.answered == "one"


def test_the_last_of_two_counts(asked: Asked) -> None:
    requests = SaveRequests(asked)
    asked.value = "one"
    requests.vote()
    requests.saved(4)
    asked.value = "two"
    assert requests.vote() == 1
    requests.committed(4)
    assert requests.answered is None, "that save began before it was asked for"
    requests.saved(5)
    requests.committed(5)
    assert requests.answered == "two"


def test_an_answer_is_not_given_again_by_the_next_start(asked: Asked) -> None:
    asked.value = "one"
    assert SaveRequests(asked, answered="one").vote() == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_commits_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    model, rows = tiny.llama(tmp_path / "model"), tiny.dataset(tmp_path / "assets", "prompt_completion")
    document = causal_lm("asked", model, rows, steps=ENDLESS)
    document["spec"]["checkpoint"] = {"everySteps": ENDLESS}
    run = Run(document, tmp_path / "run")
    with run.started() as process:
        channel = Channel(run.local().channel)

        def step() -> int:
            told = channel.progress()
            assert process.poll() is None, run.log_tail()
            return told.progress.step if told is not None and told.progress is not None else 0

        def answered() -> str | None:
            told = channel.progress()
            assert process.poll() is None, run.log_tail()
            return told.checkpoint_request if told is not None else None

        wait_until(lambda: step() > 0, "a step")
        assert run.checkpoints() == {}
        asked_at = step()
        channel.request_save("now")
        wait_until(lambda: answered() == "now", "the answer")
        committed = run.newest_step()
        assert committed >= asked_at
        wait_until(lambda: step() > committed, "a step after it")
        assert len(run.checkpoints()) == 1, "one was asked for"
    run.assert_commits_whole()
