"""The preflight as a process: everything that can be found wrong before a GPU is held, all of it at once.

The operator runs it in a pod of its own before it makes the RayCluster, with the run's image, identity and secrets;
`dsft preflight` runs it here. Its last line on stdout, and its termination message, is the result; its log has one sample as it
is trained on.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dsft_api.conditions import ExitCode
from dsft_api.job import Job
from dsft_api.layout import PREFLIGHT_FILE
from dsft_api.plain_secrets import without_secrets
from dsft_api.preflight import Finding, PreflightResult
from dsft_trainer import preflight_checks as checks
from dsft_trainer.bounded import within
from dsft_trainer.checkpoint.store import store_of
from dsft_trainer.data.prepare import parts_of
from dsft_trainer.errors import TrainerError, failure_of
from dsft_trainer.pins import with_known_commits
from dsft_trainer.preflight_checks import Look

log = logging.getLogger(__name__)

TERMINATION_LOG = Path("/dev/termination-log")
WRITE_SECONDS = 10.0
# What a result holds.
MOST, MOST_CHARACTERS = 16, 1000


@dataclass(frozen=True)
class Check:
    """One row of the preflight: what it does, the field that it is about, and how long it may take."""

    do: Callable[[Look], None]
    field: str
    seconds: float = 60.0


CHECKS = (
    Check(checks.numbers, "spec.training"),
    Check(checks.storage, "spec.storage"),
    Check(checks.start_from, "spec.startFrom"),
    Check(checks.program_module, "spec.program", 120.0),
    Check(checks.model, "spec.model"),
    Check(checks.train_data, "spec.data.train", 120.0),
    Check(checks.eval_data, "spec.data.eval", 120.0),
    Check(checks.sample, "spec.data"),
    Check(checks.disk, "spec.nodePools"),
    Check(checks.shared_memory, "spec.nodePools"),
)


def preflight(job: Job, *, here: bool) -> int:
    """Run all checks, tell what they found, and end with the exit code of the first finding."""
    with tempfile.TemporaryDirectory(
        prefix="dsft-preflight-", dir=os.environ.get("DSFT_SCRATCH"), ignore_cleanup_errors=True
    ) as cache:
        look = Look(with_known_commits(job), Path(cache), here=here)
        findings = [finding for check in CHECKS if (finding := _find(check, look)) is not None]
    result = PreflightResult(
        run_uid=job.run.uid, findings=tuple(findings[:MOST]), unchecked=tuple(look.unchecked[:MOST])
    )
    if look.sample:
        log.info("row 0 of %s as it is trained on, in [[ ]]: %s", parts_of("train", look.rows)[0].field, look.sample)
    within(WRITE_SECONDS, lambda: _keep(look, result))
    _tell(result)
    return result.findings[0].failure_class.failure.exit_code if result.findings else ExitCode.OK


def _find(check: Check, look: Look) -> Finding | None:
    """What the check found. What may pass by itself, and silence, hold no run back: they are noted."""
    look.field = None
    outcome = within(check.seconds, lambda: _error_of(check, look))
    field = look.field or check.field
    if outcome is None:
        look.unchecked.append(f"{field}: no answer within {check.seconds:.0f} s")
        return None
    (error,) = outcome
    if error is None:
        log.info("%s: %s", check.do.__name__, "nothing found")
        return None
    log.log(logging.INFO if error.failure_class.failure.retried else logging.ERROR, "%s: %s", field, error)
    if error.failure_class.failure.retried:
        look.unchecked.append(_told(f"{field}: {error.message}"))
        return None
    return Finding(
        failure_class=error.failure_class,
        field=field,
        message=_told(error.message),
        remedy=error.remedy[:MOST_CHARACTERS],
    )


def _told(message: str) -> str:
    """As it may stand in the resource's status."""
    return without_secrets(message, os.environ)[:MOST_CHARACTERS]


def _error_of(check: Check, look: Look) -> tuple[TrainerError | None]:
    try:
        check.do(look)
    except Exception as error:  # noqa: BLE001  the edge of a check
        return (failure_of(error),)
    return (None,)


def _keep(look: Look, result: PreflightResult) -> None:
    """Leave it in the run's folder: who may read the resource may not read the data, so its sample goes no other way."""
    document = {
        **result.to_wire(),
        "sample": look.sample,
        "bytesToFetch": look.to_fetch,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store_of(look.job).impatient().put_bytes(
        PREFLIGHT_FILE, json.dumps(document, indent=1, ensure_ascii=False).encode()
    )


def _tell(result: PreflightResult) -> None:
    text = result.to_message()
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    # There in a container only.
    with suppress(OSError):
        if TERMINATION_LOG.is_file():
            TERMINATION_LOG.write_text(text, encoding="utf-8")
