"""Events of a resource: one on each transition, with a name that its content decides, so that a repeat is refused.

The API server keeps them for an hour; what must last is in the status.
"""

import hashlib
from datetime import UTC, datetime
from typing import Any

from dsft_api import API_VERSION, KIND
from dsft_operator.core.observed import Run

MAX_MESSAGE = 1024
COMPONENT = "dsft-operator"


def event(run: Run, kind: str, reason: str, message: str) -> dict[str, Any]:
    """A core/v1 Event about a run. The same reason and message of the same attempt have the same name."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    content = f"{run.uid}/{run.status.attempt}/{reason}/{message}"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{run.name}.{hashlib.sha256(content.encode()).hexdigest()[:16]}",
            "namespace": run.namespace,
        },
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": run.name,
            "namespace": run.namespace,
            "uid": run.uid,
        },
        "type": kind,
        "reason": reason,
        "message": message[:MAX_MESSAGE],
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
