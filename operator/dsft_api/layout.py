"""Names inside a run's folder in storage: the part of the layout that more than the trainer reads (design section 5)."""

RUN_FILE = "run.json"
"""Written once, by the first attempt: identity, versions, and the threads that every rank is pinned to."""

RESULT_FILE = "RESULT.json"
"""Written last: the run is over when it exists."""

PROGRESS_FILE = "progress.json"
"""The newest progress document, seconds old."""

PREFLIGHT_FILE = "preflight.json"
"""What the last preflight found, with one sample as it is trained on."""

TOKENS = "tokens"
"""Folders of tokens by a digest of what made them, for the next start; deleted when the run succeeded."""

CHECKPOINTS = "checkpoints"
ATTEMPTS = "attempts"
EXPORT = "export"


def attempt_logs(attempt: int) -> str:
    """The folder of what driver and ranks of an attempt printed."""
    return f"logs/attempt-{attempt}"
