"""In a kubelet's place for the pods of preflights, and no others: each ends at once with the result that a test wants."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from kubernetes.client import ApiClient, ApiException, CoreV1Api

from dsft_api.preflight import Finding, PreflightResult
from dsft_operator.core.naming import RUN_UID_LABEL

JOB_LABEL = "batch.kubernetes.io/job-name"
POLL_SECONDS = 0.2
Finds = Callable[[], tuple[Finding, ...]]


@contextmanager
def ended(client: ApiClient, finds: Finds = tuple) -> Iterator[None]:
    """End the pods of all preflights, in all namespaces, for as long as the block lasts."""
    stop = threading.Event()
    thread = threading.Thread(target=_run, args=(CoreV1Api(client), finds, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


def _run(core: CoreV1Api, finds: Finds, stop: threading.Event) -> None:
    while not stop.wait(POLL_SECONDS):
        for pod in core.list_pod_for_all_namespaces(label_selector=JOB_LABEL).items:
            if pod.status.phase == "Pending":
                _end(core, pod, finds())


def _end(core: CoreV1Api, pod: Any, findings: tuple[Finding, ...]) -> None:
    result = PreflightResult(run_uid=pod.metadata.labels[RUN_UID_LABEL], findings=findings)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    code = findings[0].failure_class.failure.exit_code if findings else 0
    end = {"exitCode": code, "reason": "Error" if code else "Completed", "message": result.to_message()}
    container = {"name": "preflight", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
    status = {
        "phase": "Failed" if code else "Succeeded",
        "containerStatuses": [{**container, "state": {"terminated": {**end, "startedAt": now, "finishedAt": now}}}],
    }
    try:
        core.patch_namespaced_pod_status(pod.metadata.name, pod.metadata.namespace, {"status": status})
    except ApiException as answer:
        if answer.status != 404:
            raise
