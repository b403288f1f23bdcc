"""Where the time of a run goes: each second is charged to one account, by whoever knows."""

from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest

from dsft_api import goodput
from dsft_api.conditions import Phase
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import Attempt, FineTuneStatus, Spent, Usage

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def told(phase: TrainerPhase = TrainerPhase.TRAINING, seconds: float = 0, **spent: float) -> Progress:
    return Progress(
        seq=1, run_uid="u", attempt=1, phase=phase, spent=Spent(**spent) if spent else None, updated_at=at(seconds)
    )


def attempt(**facts: Any) -> Attempt:
    return Attempt(**{"number": 1, "start_time": NOW, **facts})


KNOWN = {"useful_seconds": 10, "uncommitted_seconds": 4, "blocked_seconds": 1, "restart_seconds": 2}


@pytest.mark.parametrize(
    ("phase", "more"),
    [
        (TrainerPhase.STARTING, {"restart_seconds": 5}),
        (TrainerPhase.LOADING, {"restart_seconds": 5}),
        (TrainerPhase.TRAINING, {"useful_seconds": 5, "uncommitted_seconds": 5}),
        (TrainerPhase.EVALUATING, {"useful_seconds": 5, "uncommitted_seconds": 5}),
        (TrainerPhase.SAVING, {"blocked_seconds": 5}),
        (TrainerPhase.EXPORTING, {"useful_seconds": 5, "uncommitted_seconds": 5}),
        (TrainerPhase.INTERRUPTED, {"restart_seconds": 5}),
    ],
)
def test_time_is_charged_to_what_was_done_in_it(phase: TrainerPhase, more: dict[str, float]) -> None:
    expected = Spent(**{name: KNOWN.get(name, 0) + more.get(name, 0) for name in KNOWN | more})
    assert goodput.charged(told(phase, **KNOWN), at(5)) == expected
    assert goodput.charged(told(phase, **KNOWN), at(-5)) == Spent(**KNOWN), "a clock that went back takes nothing away"


def test_a_commit_holds_what_was_useful_when_its_save_began() -> None:
    assert goodput.committed(Spent(**KNOWN), 8) == Spent(**KNOWN | {"uncommitted_seconds": 2})
    assert goodput.committed(Spent(**KNOWN), 10).uncommitted_seconds == 0


def test_a_loss_throws_away_what_no_commit_holds() -> None:
    assert goodput.thrown_away(Spent(**KNOWN)) == Spent(
        useful_seconds=6, redone_seconds=4, blocked_seconds=1, restart_seconds=2
    )


class Row(NamedTuple):
    """What was told last, when the attempt ended, how, and the account then."""

    told: Progress | None
    end: float
    succeeded: bool
    useful: float
    redone: float
    blocked: float
    restart: float


TRAINED = {"useful_seconds": 70, "uncommitted_seconds": 20, "blocked_seconds": 2, "restart_seconds": 8}
ENDS = {
    "it never said a word": Row(None, 30, False, 0, 0, 0, 30),
    "it died while it loaded": Row(told(TrainerPhase.LOADING, 10), 30, False, 0, 0, 0, 30),
    # 100 s by then, of which the trainer knows 80: 20 s before its first word.
    "it succeeded": Row(told(TrainerPhase.SUCCEEDED, 100, **TRAINED), 101, True, 71, 0, 2, 28),
    "its head was lost": Row(told(seconds=100, **TRAINED), 160, False, 50, 80, 2, 28),
    "it committed, and was stopped": Row(
        told(TrainerPhase.INTERRUPTED, 100, **TRAINED | {"uncommitted_seconds": 0}), 103, False, 70, 0, 2, 31
    ),
    "its ranks had started again": Row(told(seconds=100, **TRAINED, redone_seconds=15), 100, False, 50, 35, 2, 13),
    "the clock of its head is ahead": Row(told(seconds=30, **TRAINED), 31, False, 50, 20, 2, 8),
}


@pytest.mark.parametrize("row", ENDS.values(), ids=ENDS)
def test_the_account_of_an_attempt_that_ended(row: Row) -> None:
    known = attempt()
    if row.told is not None:
        known = known.model_copy(update={"spent": goodput.heard(known, row.told)})
    spent = goodput.closed(known, at(row.end), succeeded=row.succeeded)
    assert (spent.useful_seconds, spent.redone_seconds, spent.blocked_seconds, spent.restart_seconds) == (
        row.useful,
        row.redone,
        row.blocked,
        row.restart,
    )
    assert spent.uncommitted_seconds == 0
    assert spent.seconds >= row.end


def test_the_sum_over_attempts_comes_out_the_same_however_often_it_is_looked_at() -> None:
    """Also by an operator that restarted in between and knows only what the status says, with its rounding."""

    def sums(looks: int) -> Usage:
        usage: Usage | None = None
        for number in (1, 2):
            known = attempt(number=number, gpus=8)
            for look in range(1, looks + 1):
                share = 33.33 * look / looks
                document = told(seconds=40 * look / looks, useful_seconds=share, uncommitted_seconds=share / 2)
                after = known.model_copy(update={"spent": goodput.heard(known, document)})
                usage = Usage.model_validate(goodput.added(usage, known, after).to_wire())
                known = Attempt.model_validate(after.to_wire())
            ended = known.model_copy(update={"spent": goodput.closed(known, at(50), succeeded=number == 2)})
            usage = goodput.added(usage, known, ended)
        assert usage is not None
        return usage

    once = sums(1)
    assert (once.useful_seconds, once.redone_seconds, once.restart_seconds) == (59.9, 26.7, 13.4)
    assert (once.gpu_seconds, once.wasted_gpu_seconds) == (800, 320.8)
    assert once.goodput == 0.599
    assert sums(97).to_wire() == once.to_wire()


def test_without_gpus_there_are_no_gpu_seconds() -> None:
    ended = attempt(spent=Spent(useful_seconds=5))
    assert goodput.added(None, attempt(), ended) == Usage(
        useful_seconds=5, redone_seconds=0, blocked_seconds=0, restart_seconds=0, goodput=1
    )


def status(phase: Phase | None, *, ended: float | None = None, runs: bool = False, **usage: Any) -> FineTuneStatus:
    attempts = (attempt(end_time=at(ended)),) if ended is not None else (attempt(),) if runs else ()
    return FineTuneStatus(phase=phase, attempts=attempts, usage=Usage(**usage) if usage else None)


P = Phase
# situation: before, after, and since when it waits and for how long it has waited at second 100
WAITS: dict[str, tuple[FineTuneStatus, FineTuneStatus, float | None, float | None]] = {
    "it is new": (status(None), status(P.PROVISIONING), 100, None),
    "it goes on waiting": (
        status(P.QUEUED, waiting_since=at(40)),
        status(P.PROVISIONING, waiting_since=at(40)),
        40,
        None,
    ),
    "its attempt begins": (
        status(P.PROVISIONING, waiting_since=at(40), waiting_seconds=5),
        status(P.STARTING, runs=True, waiting_since=at(40), waiting_seconds=5),
        None,
        65,
    ),
    "its attempt ended while nobody looked": (status(P.RUNNING, runs=True), status(P.PENDING, ended=70), 70, None),
    "its attempt failed, and the wait goes on": (
        status(P.PENDING, ended=70, waiting_since=at(70)),
        status(P.PROVISIONING, ended=70, waiting_since=at(70)),
        70,
        None,
    ),
    "an attempt without its KubeRay": (status(P.RUNNING, runs=True), status(P.PENDING, runs=True), None, None),
    "it is suspended while it waits": (
        status(P.QUEUED, waiting_since=at(40)),
        status(P.SUSPENDED, waiting_since=at(40)),
        None,
        60,
    ),
    "it is resumed": (status(P.SUSPENDED, ended=10), status(P.PENDING, ended=10), 100, None),
    "it failed while it waited": (
        status(P.QUEUED, waiting_since=at(40)),
        status(P.FAILED, waiting_since=at(40)),
        None,
        60,
    ),
    "a new retry.token": (status(P.FAILED, ended=10), status(P.PENDING, ended=10), 100, None),
    "it succeeds": (status(P.EXPORTING, runs=True), status(P.SUCCEEDED, ended=99), None, None),
    "a clock that went back": (
        status(P.PROVISIONING, waiting_since=at(200)),
        status(P.STARTING, runs=True, waiting_since=at(200)),
        None,
        0,
    ),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_is_a_wait(name: str) -> None:
    before, after, since, seconds = WAITS[name]
    usage = goodput.waited(before, after, at(100)).usage or Usage()
    assert usage.waiting_since == (None if since is None else at(since))
    assert usage.waiting_seconds == seconds
