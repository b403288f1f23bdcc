"""A checkpoint that a user asked for by annotation: passed on once, to a trainer that trains, until the status echoes its value.

The trainer has no rights on the API server and the operator none in pods, so a request travels as a second, short submission
beside the driver's, with a constant command. Its id comes from attempt and value: asked again it is the same one.
"""

from dataclasses import dataclass

from dsft_api import CHECKPOINT_REQUEST
from dsft_api.job import SAVE_ENV
from dsft_api.progress import Progress, TrainerPhase
from dsft_operator.core.decision import RequestSave, SubmitJob
from dsft_operator.core.naming import save_id
from dsft_operator.core.observed import Observed, RayJob, Run

ENTRYPOINT = "python -m dsft_trainer save"
MAX_VALUE = 256
MARK = "; a checkpoint was asked for"
_TRAINS = (TrainerPhase.TRAINING, TrainerPhase.EVALUATING, TrainerPhase.SAVING)


def open_request(run: Run) -> str | None:
    """The request that is not answered yet."""
    value = run.checkpoint_request
    return value if value and value != run.status.checkpoint_request else None


@dataclass(frozen=True)
class Asked:
    """What becomes of a request: what the message says of it, what is done, and whether its answer is a matter of seconds."""

    words: str = ""
    actions: tuple[RequestSave, ...] = ()
    is_soon: bool = False


def asked(seen: Observed, progress: Progress | None) -> Asked:
    """What to do about an open request while the driver runs, and what the message says of it."""
    run, value = seen.run, open_request(seen.run)
    if value is None or run.status.attempt is None or (progress is not None and progress.checkpoint_request == value):
        return Asked()
    if run.spec is not None and run.spec.program is not None:
        return Asked(f"{MARK}: a program decides itself when it reports one")
    if len(value) > MAX_VALUE or not value.isprintable():
        return Asked(f"{MARK}, but {CHECKPOINT_REQUEST} must be at most {MAX_VALUE} printable characters")
    if progress is None or progress.phase not in _TRAINS:
        return Asked(f"{MARK}: it is made once the ranks train")
    if seen.save is None:
        return Asked(MARK, (RequestSave(_submission(run, run.status.attempt, value)),), is_soon=True)
    if isinstance(seen.save, RayJob) and seen.save.state in ("FAILED", "STOPPED"):
        last = seen.save.message.strip().rpartition("\n")[2][-200:]
        return Asked(f"{MARK}, which the trainer was not told ({last}): ask again with another value")
    return Asked(MARK, is_soon=isinstance(seen.save, RayJob))


def _submission(run: Run, attempt: int, value: str) -> SubmitJob:
    return SubmitJob(
        submission_id=save_id(run.uid, attempt, value, run.status.checkpoint_request),
        entrypoint=ENTRYPOINT,
        environment={SAVE_ENV: value},
        metadata={"namespace": run.namespace, "name": run.name, "uid": run.uid},
    )
