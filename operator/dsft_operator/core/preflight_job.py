"""The preflight's Job: one short pod with the run's image and identity that looks at storage, model and data. Pure builders.

It has no label of a queue: it asks for no GPU, and must not wait behind those that do.
"""

from typing import Any

from dsft_api.resource import digest
from dsft_api.spec import FineTuneSpec
from dsft_operator.config import OperatorConfig
from dsft_operator.core import naming
from dsft_operator.core.observed import Run
from dsft_operator.core.pods import preflight_pod, run_labels
from dsft_operator.core.raycluster import run_reference
from dsft_operator.core.submission import job_of, storage_prefix

Manifest = dict[str, Any]

# With the pull of an image of some GB, and of a node that comes up for it.
SECONDS = 600
# One that nobody deletes, since the operator is gone, say.
TTL_SECONDS = 3600


def preflight_job(run: Run, spec: FineTuneSpec, config: OperatorConfig) -> Manifest:
    """The Job for this spec. It is not tried again: what it cannot tell, the ranks will."""
    labels = run_labels(run.name, run.uid)
    job = job_of(run, spec, (run.status.attempt or 0) + 1, storage_prefix(run, spec))
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": preflight_name(run, spec),
            "namespace": run.namespace,
            "labels": labels,
            "ownerReferences": [run_reference(run)],
        },
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": SECONDS,
            "ttlSecondsAfterFinished": TTL_SECONDS,
            "template": preflight_pod(spec, config, labels, job.to_json()),
        },
    }


def preflight_name(run: Run, spec: FineTuneSpec) -> str:
    """Another spec, also another retry.token, is another Job. One that is only suspended and resumed is the same."""
    body = spec.model_copy(update={"suspend": False}).model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return naming.preflight_name(run.name, run.uid, digest(body))


def is_due(run: Run) -> bool:
    """Whether this spec was not looked at yet. `spec` and no problems are given."""
    known, spec = run.status.preflight, run.spec
    if spec is None or run.problems or not spec.preflight.enabled:
        return False
    return known is None or known.end_time is None or known.job != preflight_name(run, spec)


def job_to_look_for(run: Run) -> str | None:
    """The Job that may be there: the one that was begun, the one that is about to be, else the one that is over."""
    if run.deleting is not None:
        # It goes with the resource, and whatever keeps it from being read must not keep the resource.
        return None
    known = run.status.preflight
    if known is not None and known.end_time is None:
        return known.job
    if run.spec is not None and is_due(run):
        return preflight_name(run, run.spec)
    # Where a read was late, it ended as one that had no Job.
    return known.job if known is not None else None
