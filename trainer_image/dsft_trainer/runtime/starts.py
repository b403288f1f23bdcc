"""Starts of the ranks inside one attempt: which losses they are started again after, and what is told of it. Pure.

A lost rank or a hang is over when the ranks start again from the newest commit, in seconds, with the same driver. Whatever else
ends them, and a loss that comes again before there was a commit, ends the attempt: whoever starts attempts knows more.
"""

from dataclasses import dataclass
from datetime import datetime

from dsft_api import goodput
from dsft_api.conditions import FailureClass
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import Loss
from dsft_trainer.errors import TrainerError

HEALED = frozenset({FailureClass.WORKER_LOST, FailureClass.HANG})
MAX_IN_VAIN = 1
"""Starts in a row that may be lost before they committed anything, and yet be followed by another one."""
KEPT_LOSSES = 5


@dataclass(frozen=True)
class Start:
    """One start of all ranks, counted from 1 in each attempt."""

    number: int
    newest: str | None
    """What names the newest commit at its beginning."""
    opening: Progress
    in_vain: int = 0
    """Starts in a row before it that committed nothing."""

    def after(
        self, failure: TrainerError, told: Progress, newest: str | None, now: datetime, *, draining: bool
    ) -> "Start | None":
        """The start that follows this one; None if the attempt is over. `told` was its last document."""
        in_vain = self.in_vain + 1 if newest == self.newest else 0
        if draining or failure.failure_class not in HEALED or in_vain > MAX_IN_VAIN:
            return None
        return Start(self.number + 1, newest, _reopened(told, failure, now), in_vain)


def _reopened(told: Progress, failure: TrainerError, now: datetime) -> Progress:
    step = told.progress.step if told.progress is not None else None
    loss = Loss(failure_class=failure.failure_class, step=step, time=now, message=_one_line(failure.message))
    return told.model_copy(
        update={
            "seq": told.seq + 1,
            "phase": TrainerPhase.STARTING,
            "restarts": told.restarts + 1,
            "losses": (*told.losses, loss)[-KEPT_LOSSES:],
            "spent": goodput.thrown_away(goodput.charged(told, now)),
            "failure": None,
            "message": story(loss),
            "updated_at": now,
        }
    )


def story(loss: Loss) -> str:
    """A loss in a line."""
    where = f" after step {loss.step}" if loss.step is not None else ""
    return f"{loss.failure_class}{where}: {loss.message}"


def waiting(start: Start, lacking: str | None) -> str:
    """What status says while the ranks have not been heard of. `lacking`: what they wait for, if anything."""
    if not start.opening.losses:
        return lacking or "starting the ranks"
    doing = lacking or "starting the ranks again from the last commit"
    return f"{doing} ({story(start.opening.losses[-1])})"


def _one_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:300]
