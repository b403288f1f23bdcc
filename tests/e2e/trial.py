"""A run that trains while something around it is broken, and what is asked of it afterwards.

Whatever the fault: the run ends well by itself, what was committed still counts, each step was trained as in the run that nobody
disturbed, and nothing stays behind. How it got there (attempts, losses, their classes) is asked by each test.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsft_api.conditions import FailureClass, Phase
from dsft_api.status import Attempt, FineTuneStatus
from dsft_trainer.checkpoint.commits import Claim
from dsft_trainer.checkpoint.listing import read_claims, read_commits
from dsft_trainer.checkpoint.store import Store
from tests.e2e.manifests import Assets, tiny_run
from tests.e2e.tenant import START_SECONDS, Tenant, seconds_between
from tests.e2e.watcher import Look, Watcher, phases
from tests.trainer.runs import fault_of, metrics_of, timeless

NAME = "trial"
STEPS = 250
EVERY_STEPS = 25
KEEP_LAST = 2
DRAIN_SECONDS = 20
Lines = dict[int, dict[str, Any]]


def disturbed_run(assets: Assets, *, steps: int = STEPS, edits: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Many small steps: minutes of training with a commit every few seconds. More `steps` train the first ones alike."""
    policy = {"everySteps": EVERY_STEPS, "keepLast": KEEP_LAST, "drainSeconds": DRAIN_SECONDS}
    ours = {
        "spec.checkpoint": policy,
        "spec.training.globalBatchSize": 8,
        "spec.execution.microBatchSize": 2,
        "spec.evaluation": {"everySteps": 100},
    }
    return tiny_run(NAME, assets, steps=steps, edits={**ours, **(edits or {})})


@dataclass(frozen=True)
class Row:
    """What is told of one fault."""

    fault: str
    seen: str
    seconds: str
    standstill: str
    lost: str
    attempts: str

    def __str__(self) -> str:
        return f"| {self.fault} | {self.seen} | {self.seconds} | {self.standstill} | {self.lost} | {self.attempts} |"


HEADER = (
    "| Fault | Phases in `kubectl get dsft -w` since | Seconds to the next step | Longest standstill | Steps lost | Attempts |\n"
    "|---|---|---|---|---|---|"
)


@dataclass
class Trial:
    """One run in a namespace of its own."""

    tenant: Tenant
    assets: Assets
    folder: Path
    book: list[Row]
    stack: ExitStack
    steps: int = STEPS
    watcher: Watcher = field(init=False)
    hit_at: datetime = field(init=False)
    hit_step: int = field(init=False)
    hit_lines: int = field(init=False)

    def begin(self, *, steps: int = STEPS, edits: Mapping[str, Any] | None = None) -> None:
        """Apply it, and come back when it trains and has committed something."""
        self.steps = steps
        self.tenant.apply(disturbed_run(self.assets, steps=steps, edits=edits))
        self.watcher = self.stack.enter_context(Watcher(self.tenant, NAME, self.folder / "watch.log"))
        self.tenant.until_step(NAME, EVERY_STEPS + 1)
        self.tenant.until("a commit is told", lambda: self.watcher.looks and self.watcher.looks[-1].committed)

    def hit(self) -> None:
        """The fault comes now."""
        self.hit_step = self.tenant.status(NAME).progress.step
        self.hit_lines = len(self.watcher.table.splitlines())
        self.hit_at = datetime.now(UTC)

    def until_started_again(self, seconds: float = START_SECONDS) -> None:
        """Until the ranks have started once more, from the last commit."""
        self.tenant.until("the ranks start again", lambda: len(read_claims(self.store)) > 1, seconds)

    def finish(self, fault: str, seconds: float = START_SECONDS) -> FineTuneStatus:
        """The end, which must be a good one; enters the row of the fault."""
        status = self.tenant.until_phase(NAME, Phase.SUCCEEDED, seconds)
        self.enter(fault, status)
        self._assert_nothing_lost()
        self.tenant.until_nothing_left()
        return status

    def enter(self, fault: str, status: FineTuneStatus) -> None:
        """Write down what was seen of a run that goes on, or went on to its end."""
        seconds, still = f"{self.seconds_to_next_step():.0f}", f"{self.longest_standstill():.0f}"
        self._enter(fault, seconds, still, str(self.steps_lost()), story(status))

    def enter_gone(self, fault: str) -> None:
        """Write down that the run is gone, as was wished."""
        seconds = (datetime.now(UTC) - self.hit_at).total_seconds()
        self._enter(fault, f"gone after {seconds:.0f}", "-", "-", "-")

    def _enter(self, fault: str, *told: str) -> None:
        table = self.watcher.table
        later = "\n".join(table.splitlines()[max(0, self.hit_lines - 1) :])
        row = Row(fault, ", ".join(phases(later)), *told)
        print(f"kubectl get dsft {NAME} -w\n{table}\n{HEADER}\n{row}")
        self.book.append(row)

    @property
    def store(self) -> Store:
        return self.tenant.store(NAME)

    def seconds_to_next_step(self) -> float:
        """From the fault until a step is told that is new; looks are half a second apart, the operator's two.

        What a run that was struck a moment ago still told of before does not count: after the last restart, if there was one.
        """
        claims = read_claims(self.store)
        since = max(self.hit_at, claims[-1].start_time) if len(claims) > 1 else self.hit_at
        known = self._trained_before(claims[-1]) if len(claims) > 1 else self.hit_step
        later = (look.at for look in self.watcher.looks if look.at > since and look.step > known)
        return (next(later) - self.hit_at).total_seconds()

    def longest_standstill(self) -> float:
        """Seconds for which no step was told that was new, at most, since the fault: it may be felt long after it came."""
        step, since, longest = self.hit_step, self.hit_at, 0.0
        for look in self.watcher.looks:
            if look.at > self.hit_at and look.step > step:
                longest = max(longest, (look.at - since).total_seconds())
                step, since = look.step, look.at
        return longest

    def steps_lost(self) -> int:
        """Steps that were trained again, over all starts of the ranks."""
        claims = read_claims(self.store)
        return sum(max(0, self._trained_before(claim) - claim.base_step) for claim in claims[1:])

    def _trained_before(self, claim: Claim) -> int:
        """The last step that is known to have been trained before a start: from what was told, and from storage."""
        told = [look.step for look in self.watcher.looks if look.at < claim.start_time]
        status = self.tenant.status(NAME)
        told += [loss.step or 0 for a in status.attempts for loss in a.losses if loss.time <= claim.start_time]
        earlier = [c for c in read_claims(self.store) if c.id < claim.id]
        told += [line["step"] for c in earlier for line in metrics_of(self.store, c.id) if line["kind"] == "train"]
        return max(told, default=0)

    def assert_lost_little(self) -> None:
        """A failure costs the steps since the last commit: one interval, and what was trained while its save was on its way."""
        starts = len(read_claims(self.store)) - 1
        assert self.steps_lost() <= 2 * EVERY_STEPS * starts

    def assert_same_training(self, reference: Lines) -> None:
        """Loss and gradient norm of every step in every start are those of the undisturbed run, bit for bit."""
        seen: set[int] = set()
        for claim in read_claims(self.store):
            for step, line in lines_of(self.store, [claim]).items():
                assert line == reference.get(step, line), f"{claim.id} from step {claim.base_step}"
                seen.add(step)
        assert seen == set(range(1, self.steps + 1))

    def _assert_nothing_lost(self) -> None:
        looks, store = self.watcher.looks, self.store
        committed = [look.committed for look in looks]
        assert committed == sorted(committed), "a commit that was told is told no more"
        for claim in read_claims(store)[1:]:
            told = [look.committed for look in looks if look.at < claim.start_time]
            assert claim.base_step >= max(told, default=0), f"{claim.id} starts before a commit that was told"
        left = read_commits(store)
        assert [fault for commit in left if (fault := fault_of(store, commit.name))] == []
        newest = [commit.step for commit in left][-KEEP_LAST:]
        assert newest[-1] == self.steps
        names = {commit.name for commit in left}
        gone = {ref.uri: ref.step for ref in _told(looks) if ref.uri.rpartition("/")[2] not in names}
        assert all(step < newest[0] for step in gone.values()), f"not retired, and gone: {gone}"


def train_undisturbed(tenant: Tenant, assets: Assets) -> Lines:
    """The same run with nothing broken; what it stored of each step."""
    tenant.apply(disturbed_run(assets))
    status = tenant.until_phase(NAME, Phase.SUCCEEDED)
    (attempt,) = status.attempts
    print(f"{STEPS} steps undisturbed in {seconds_between(attempt.start_time, attempt.end_time):.0f} s")
    store = tenant.store(NAME)
    return lines_of(store, read_claims(store))


def lines_of(store: Store, claims: Iterable[Claim]) -> Lines:
    """What these starts stored of their steps, without what the clock decides."""
    lines = (line for claim in claims for line in metrics_of(store, claim.id) if line["kind"] == "train")
    return {line["step"]: timeless(line) for line in lines}


def lost(status: FineTuneStatus) -> list[FailureClass]:
    """All losses of a run, whether the ranks started again inside the attempt or by the next one.

    A pod that is deleted without grace may yet get its farewell through: then the attempt ends.
    """
    ended = [attempt.failure_class for attempt in status.attempts if attempt.failure_class is not None]
    return [*ended, *(loss for attempt in status.attempts for loss in losses(attempt))]


def classes(status: FineTuneStatus) -> list[FailureClass | None]:
    """How the attempts ended, and that they are numbered from 1."""
    assert [attempt.number for attempt in status.attempts] == list(range(1, len(status.attempts) + 1))
    return [attempt.failure_class for attempt in status.attempts]


def losses(attempt: Attempt) -> list[FailureClass]:
    """The losses that were healed inside an attempt."""
    assert (attempt.restarts or 0) == len(attempt.losses)
    return [loss.failure_class for loss in attempt.losses]


def story(status: FineTuneStatus) -> str:
    """The attempts in a line, as `Preempted, then well (healed: WorkerLost)`."""
    parts = []
    for attempt in status.attempts:
        healed = f" (healed: {', '.join(losses(attempt))})" if attempt.losses else ""
        ended = attempt.failure_class or ("well" if attempt.end_time is not None else "not ended")
        parts.append(f"{ended}{healed}")
    return ", then ".join(parts)


def _told(looks: Iterable[Look]) -> Iterable[Any]:
    return (ref for look in looks if look.status.checkpoints for ref in look.status.checkpoints.retained)
