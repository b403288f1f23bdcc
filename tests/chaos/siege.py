"""One run that is killed again and again, and judged after each kill.

Each kill ends when the next start of the ranks has done a step. Then must hold: nothing that was seen committed is lost or
damaged; that start went on from the newest commit there was; the losses that are stored are the reference's; and no process of
what was killed is alive.
"""

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import psutil

from dsft_api.conditions import ExitCode
from dsft_api.layout import CHECKPOINTS
from dsft_api.progress import TrainerPhase
from dsft_trainer.checkpoint.commits import COMMIT_FILE, Claim, ClaimId
from dsft_trainer.runtime.starts import MAX_IN_VAIN
from tests.chaos.deck import Card, Fate, Kind, Victim
from tests.chaos.ledger import Ledger
from tests.s3_faults import FaultyS3, Gate
from tests.s3_server import S3Server
from tests.trainer.killing import Training, assert_same_training
from tests.trainer.runs import Run, driver, family, is_alive, kill_session, ranks, wait_until

# Training is held back to about this pace, so that no machine is so fast that a run ends before it is killed.
SECONDS_PER_PUT = 0.15
# Steps that one kill may use up, with room to spare.
STEPS_PER_KILL = 40
WORKERS = 2
# For all steps of a run, on a machine that is busy with other things too.
FINISH_SECONDS = 1200.0
WAIT_SECONDS = 600.0
# For what was killed, and what needed it, to be gone.
END_SECONDS = 60.0
STEPPING = (TrainerPhase.TRAINING, TrainerPhase.EVALUATING, TrainerPhase.SAVING)


@dataclass(frozen=True)
class Blow:
    """What one kill did."""

    card: Card
    runtime: str
    at_step: int
    """The step that was told last."""
    base_step: int
    """Where the next start went on from."""
    torn: int
    """Checkpoints that were begun and never committed."""
    commits: int
    """Commits seen so far in this run."""
    seconds: float
    """To the next step that was done, or, where nobody was killed, to the next commit."""
    healed: bool
    """Inside the attempt."""

    @property
    def redone(self) -> int:
        """Steps trained again."""
        return max(0, self.at_step - self.base_step)


class Siege:
    """One run on S3 behind a proxy."""

    def __init__(self, run: Run, proxy: FaultyS3, server: S3Server, reference: Run) -> None:
        self.run = run
        self.proxy = proxy
        self.server = server
        self.reference = reference
        self.training = Training.of(reference)
        policy = run.local().resource.spec.checkpoint
        self.ledger = Ledger(run, policy.keep_last, policy.keep_best)
        self.runtime = ""
        self._started: list[tuple[ExitStack, subprocess.Popen[bytes]]] = []
        self._in_vain = 0
        self._judged: set[ClaimId] = set()
        self._dying: list[tuple[float, list[psutil.Process]]] = []

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The `dsft run` that was started last."""
        return self._started[-1][1]

    @property
    def has_room(self) -> bool:
        """Whether there are steps enough left for one more kill."""
        return self.run.newest_step() + STEPS_PER_KILL <= max(self.training.trained)

    def close(self) -> None:
        """End what runs."""
        while self._started:
            self._started.pop()[0].close()

    def strike(self, card: Card) -> Blow:
        """Kill the run so, see it go on, and judge."""
        self.proxy.seconds_per_put = SECONDS_PER_PUT
        if not self._started:
            self._start(card.runtime)
            self._await_step(self._claim_after(None))
        runtime, claim = self.runtime, self.run.claims()[-1]
        hit = self._hit(card, claim)
        if card.victim is Victim.NOBODY:
            return self._outlasted(card, claim, hit)
        if card.victim is Victim.MACHINE:
            # What it sent while it lived is not called back.
            self._wait(lambda: self.proxy.is_quiet, "the last of what it sent", may_end=True)
        newest = self.ledger.newest(claim.id)
        torn = sum(not whole for whole in self.run.checkpoints().values())
        healed = self._heals(claim, newest) if card.victim is Victim.WORKER and runtime == "ray" else False
        if not healed:
            self._end(card.victim)
            self._start(card.runtime)
        following = self._claim_after(claim)
        if hit.gate is not None and card.fate is Fate.LATE:
            self._deliver(hit.gate)
        self._await_step(following)
        seconds = time.monotonic() - hit.time
        with self._braked():
            self._judge(following, newest, exact=card.kind is Kind.COMMIT or card.victim is Victim.MACHINE)
            self._in_vain = self._in_vain + 1 if healed and following.base_step == claim.base_step else 0
        self._dying.append((time.monotonic() + END_SECONDS, hit.members))
        self._bury(time.monotonic())
        return Blow(
            card,
            runtime,
            at_step=hit.step,
            base_step=following.base_step,
            torn=torn,
            commits=len(self.ledger.seen),
            seconds=seconds,
            healed=healed,
        )

    def finish(self) -> None:
        """Let the run come to its end, and hold all of it against the reference."""
        self.proxy.seconds_per_put = 0.0
        code = self.process.wait(FINISH_SECONDS)
        assert code == 0, f"exit code {code}:\n{self.run.log_tail()}"
        assert self.run.local().finished
        assert self.ledger.look()
        assert_same_training(self.run, self.reference)
        wait_until(self._all_buried, "the end of all that was killed", 2 * END_SECONDS)

    def _hit(self, card: Card, claim: Claim) -> "_Hit":
        """Wait for the moment, and kill."""
        gate: Gate | None = None
        match card.kind:
            case Kind.UPLOAD | Kind.COMMIT:
                gate = self._gate(card, claim)
                self._wait(lambda: bool(gate.held), f"a request of {card}")
            case Kind.S3_SILENT:
                self._pause(card.delay)
                self.proxy.down_until = time.monotonic() + card.down_seconds
            case Kind.S3_KILLED:
                self._pause(card.delay)
                self.server.kill()
        begin = time.monotonic()
        self._pause(card.delay)
        hit = self._kill(card, gate)
        if card.kind is Kind.S3_KILLED:
            self._pause(card.down_seconds - card.delay)
            self.server.restart()
        if gate is not None and card.fate is not Fate.LATE:
            gate.open(lose=card.fate is Fate.LOST or card.kind is Kind.COMMIT)
        return hit if card.victim is not Victim.NOBODY else replace(hit, time=begin)

    def _gate(self, card: Card, claim: Claim) -> Gate:
        name = COMMIT_FILE if card.kind is Kind.COMMIT else card.file

        def matches(method: str, path: str) -> bool:
            return method == "PUT" and f"/{CHECKPOINTS}/step-" in path and f"-{claim.id}/" in path and name in path

        return self.proxy.hold(matches, replies=card.kind is Kind.COMMIT and card.fate is Fate.ARRIVES)

    def _kill(self, card: Card, gate: Gate | None) -> "_Hit":
        step = self._told_step()
        process = self.process
        members = ranks(process)
        assert process.poll() is None, f"the run was over before its kill:\n{self.run.log_tail()}"
        assert len(members) == WORKERS, members
        sender = _owner(gate.held[0].port, members) if gate is not None else None
        if card.victim is not Victim.WORKER or self.runtime != "ray":
            members = family(process)
        begin = time.monotonic()
        match card.victim:
            case Victim.WORKER:
                peers = sorted(ranks(process), key=lambda member: member != sender)
                peers[0 if card.kind is Kind.COMMIT else card.rank].kill()
            case Victim.DRIVER:
                driver(process).kill()
            case Victim.MACHINE:
                assert kill_session(process) == -signal.SIGKILL
        if card.kind is Kind.COMMIT and sender is not None:
            # As long as it lives it may try again.
            wait_until(lambda: not is_alive(sender), f"the end of {sender}", 60)
        return _Hit(begin, step, members, gate)

    def _heals(self, claim: Claim, newest: int) -> bool:
        """Whether the ranks start again inside the attempt, as they must; but not after two starts that committed nothing."""
        self._wait(lambda: self._is_over() or self.run.claims()[-1].id > claim.id, "another start", may_end=True)
        if not self._is_over():
            return True
        was_in_vain = newest == claim.base_step and self._in_vain + 1 > MAX_IN_VAIN
        assert was_in_vain, f"the ranks were not started again:\n{self.run.log_tail()}"
        return False

    def _end(self, victim: Victim) -> None:
        """See `dsft run` end, by the kill or with the code of an attempt that lost its ranks."""
        self._wait(self._is_over, "the end of dsft run", may_end=True)
        code = -signal.SIGKILL if victim is Victim.MACHINE else ExitCode.OTHER
        assert self.process.returncode == code, f"exit code {self.process.returncode}:\n{self.run.log_tail()}"

    def _start(self, runtime: str) -> None:
        stack = ExitStack()
        self._started.append((stack, stack.enter_context(self.run.started(runtime, WORKERS))))
        self.runtime, self._in_vain = runtime, 0

    def _claim_after(self, known: Claim | None) -> Claim:
        def claims() -> list[Claim]:
            return [claim for claim in self.run.claims() if known is None or claim.id > known.id]

        self._wait(lambda: bool(claims()), "a claim")
        (claim,) = claims()
        return claim

    def _await_step(self, claim: Claim) -> None:
        """Until the trainer tells of a step of this start."""

        def steps() -> bool:
            told = self.run.told()
            return told is not None and told.phase in STEPPING and (told.attempt, told.group) == _numbers(claim)

        self._wait(steps, f"a step of {claim.id}")

    def _deliver(self, gate: Gate) -> None:
        gate.open()
        self._wait(lambda: len(gate.passed) == len(gate.held), "the request that is late")

    def _outlasted(self, card: Card, claim: Claim, hit: "_Hit") -> Blow:
        """Nobody was killed: the same start goes on, to the next commit."""
        self._wait(lambda: not self.proxy.is_down, "the end of the outage")
        newest = self.run.newest_step()
        self._wait(lambda: self.run.newest_step() > newest, "a commit after the outage")
        seconds = time.monotonic() - hit.time
        with self._braked():
            self.ledger.look()
            assert self.run.claims()[-1] == claim, "there was another start"
        return Blow(card, self.runtime, hit.step, hit.step, 0, len(self.ledger.seen), seconds, healed=False)

    def _judge(self, following: Claim, newest: int, *, exact: bool) -> None:
        self.ledger.look()
        assert following.base is None or following.base in self.ledger.seen, f"{following.base} was never committed"
        # A rank that outlived the one that was killed may have committed what it was about to.
        fits = following.base_step == newest if exact else following.base_step >= newest
        assert fits, f"{following.id} goes on from step {following.base_step}, and {newest} was committed"
        for claim in self.run.claims():
            if claim.id < following.id and claim.id not in self._judged:
                self.training.assert_equal(self.run, claim)
                self._judged.add(claim.id)

    def _all_buried(self) -> bool:
        self._bury(time.monotonic())
        return not self._dying

    def _bury(self, now: float) -> None:
        """What was killed, and all that needed it, goes by itself; meanwhile its successor is killed in its turn."""
        self._dying = [(deadline, members) for deadline, members in self._dying if any(map(is_alive, members))]
        late = [members for deadline, members in self._dying if deadline < now]
        assert not late, f"still there: {late}"
        while len(self._started) > 1 and not self._dying:
            self._started.pop(0)[0].close()

    @contextmanager
    def _braked(self) -> Iterator[None]:
        """While the judge looks, the run waits for its checkpoint."""
        gate = self.proxy.hold(lambda method, path: method == "PUT" and f"/{CHECKPOINTS}/step-" in path)
        try:
            yield
        finally:
            gate.open()

    def _told_step(self) -> int:
        told = self.run.told()
        return told.progress.step if told is not None and told.progress is not None else 0

    def _is_over(self) -> bool:
        return self.process.poll() is not None

    def _wait(self, fact: Callable[[], bool], what: str, *, may_end: bool = False) -> None:
        def heard() -> bool:
            self.ledger.hear()
            return fact() or (not may_end and self._is_over())

        wait_until(heard, what, WAIT_SECONDS)
        assert may_end or not self._is_over(), f"the run ended before {what}:\n{self.run.log_tail()}"

    def _pause(self, seconds: float) -> None:
        threading.Event().wait(seconds)


@dataclass(frozen=True)
class _Hit:
    """A kill that was done."""

    time: float
    step: int
    members: list[psutil.Process]
    """Who must be gone after it."""
    gate: Gate | None


def _numbers(claim: Claim) -> tuple[int, int]:
    return claim.id.attempt, claim.id.group


def _owner(port: int, members: list[psutil.Process]) -> psutil.Process:
    """Which of them has a connection from this port."""
    (owner,) = [m for m in members if any(c.laddr.port == port for c in m.net_connections("tcp"))]
    return owner
