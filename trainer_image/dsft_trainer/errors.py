"""The trainer's one error: a failure class, what happened, and what to do about it.

Whatever else is raised is turned into one at the edge of the process by `failure_of`, so that exit code, log and status
always speak the vocabulary of `dsft_api.conditions`.
"""

import errno
import os
import socket
import traceback

from dsft_api.conditions import ExitCode, FailureClass
from dsft_api.plain_secrets import without_secrets
from dsft_api.progress import TrainerFailure

# Of a report; the URI of a deep folder may be longer.
MAX_EVIDENCE = 1024


class TrainerError(Exception):
    """Ends the attempt with the class's exit code.

    `message` says what happened to what (file, field, value); `remedy` what to do, by default that of the class.
    """

    def __init__(self, failure_class: FailureClass, message: str, remedy: str | None = None) -> None:
        super().__init__(failure_class, message, remedy)
        self.failure_class = failure_class
        self.message = message
        self.remedy = remedy or failure_class.failure.remedy
        self.rank: int | None = None
        self.host: str | None = None
        self.evidence: str | None = None
        """Where more of it is in storage."""

    @property
    def exit_code(self) -> ExitCode:
        """The process exit code of this class."""
        return self.failure_class.failure.exit_code

    def __str__(self) -> str:
        return f"{self.failure_class}: {self.message} ({self.remedy})"

    def report(self, rank: int | None = None) -> TrainerFailure:
        """The form that the progress contract carries, without the secrets of this process: it ends in the resource's status."""
        return TrainerFailure(
            failure_class=self.failure_class,
            message=without_secrets(self.message, os.environ)[:4096],
            remedy=self.remedy[:1024],
            exit_code=self.exit_code,
            rank=self.rank if rank is None else rank,
            # Whoever tells its rank is that rank.
            host=self.host if rank is None else socket.gethostname(),
            evidence=self.evidence if len(self.evidence or "") <= MAX_EVIDENCE else None,
        )

    @staticmethod
    def from_report(failure: TrainerFailure) -> "TrainerError":
        """The error behind a report."""
        error = TrainerError(failure.failure_class, failure.message, failure.remedy)
        error.rank, error.host, error.evidence = failure.rank, failure.host, failure.evidence
        return error


# Texts by which torch, gloo and NCCL tell that another rank went away: they raise RuntimeError for everything.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Timed out waiting",
    "NCCL error",
)
_GPU_FAULT = (
    "uncorrectable ECC",
    "CUDA error: an illegal",
    "device-side assert",
    "GPU is lost",
    "unspecified launch failure",
)


def failure_of(error: BaseException) -> TrainerError:
    """Classify any exception; a TrainerError is returned as it is."""
    if isinstance(error, TrainerError):
        return error
    text = str(error)
    name = type(error).__name__
    if name == "OutOfMemoryError" or "CUDA out of memory" in text:
        return TrainerError(FailureClass.CUDA_OOM, text.splitlines()[0] if text else name)
    if isinstance(error, MemoryError):
        return TrainerError(FailureClass.HOST_OOM, "a memory allocation failed")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrainerError(
            FailureClass.UNKNOWN, f"no space left: {error}", "free space on the disk, or in storage, and run it again"
        )
    if any(sign in text for sign in _GPU_FAULT):
        return TrainerError(FailureClass.GPU_FAULT, text.splitlines()[0])
    if any(sign in text for sign in _LOST_PEER):
        return TrainerError(FailureClass.WORKER_LOST, f"another rank went away: {text.splitlines()[0][:300]}")
    where = traceback.format_exception(error)[-3:]
    return TrainerError(FailureClass.UNKNOWN, f"{name}: {text[:500]}\n{''.join(where)[-1500:]}".strip())
