"""Kubernetes JSON -> what the core speaks of."""

from typing import Any

import pytest

from dsft_api.conditions import ConditionType
from dsft_operator.adapters.reading import Judge, run_of
from dsft_operator.core.observed import Observed
from dsft_operator.core.plan import plan
from dsft_operator.core.summary import condition_of
from tests.unit.operator.situations import CONFIG, NOW, SPEC, resource, submitted


def began(spec: dict[str, Any] | None = None) -> dict[str, Any]:
    """The resource of a run that has begun."""
    return {**resource(spec), "status": submitted().run.status.to_wire()}


def test_what_is_frozen_is_frozen_where_cel_cannot_see() -> None:
    raw = began()
    assert run_of(raw, CONFIG).problems == ()
    raw["spec"] = {**raw["spec"], "training": {**raw["spec"]["training"], "seed": 7}}
    (problem,) = run_of(raw, CONFIG).problems
    assert "is another than the one the run began with" in str(problem)
    raw["status"]["attempt"] = 0
    assert run_of(raw, CONFIG).problems == ()


def test_the_admins_defaults_may_move_under_a_run() -> None:
    spec = {"storage": {}}
    at_first = CONFIG.model_copy(update={"storage": CONFIG.storage.model_copy(update={"uri": "s3://old/runs"})})
    later = CONFIG.model_copy(update={"storage": CONFIG.storage.model_copy(update={"uri": "s3://new/runs"})})
    assert run_of(resource(spec), at_first).identity == run_of(resource(spec), later).identity


@pytest.mark.parametrize(
    "part",
    [
        {"phase": "Hibernating"},
        {"conditions": [{"type": "Fancy", "status": "True", "reason": "New", "lastTransitionTime": str(NOW)}]},
        {"progress": {"step": "many"}},
        {"usage": 5},
    ],
    ids=["phase", "condition", "progress", "usage"],
)
def test_a_status_of_a_newer_operator_is_not_forgotten(part: dict[str, Any]) -> None:
    raw = began()
    known = run_of(raw, CONFIG).status
    raw["status"] |= {**part, "conditions": [*part.get("conditions", ()), *raw["status"]["conditions"]]}
    status = run_of(raw, CONFIG).status
    assert (status.attempt, status.job, status.ray_cluster) == (known.attempt, known.job, known.ray_cluster)
    assert status.attempts == known.attempts
    assert condition_of(status, ConditionType.READY) == condition_of(known, ConditionType.READY)


def test_a_part_of_the_storage_is_the_runs_and_the_rest_the_admins() -> None:
    """Another Secret for the admin's bucket: as models, since the builders read their fields."""
    storage = CONFIG.storage.model_copy(update={"uri": "s3://admin/runs", "region": "eu-central-1"})
    config = CONFIG.model_copy(update={"storage": storage})
    spec = run_of(resource({"storage": {"credentials": {"secretName": "mine"}}}), config).spec
    assert spec is not None
    assert (spec.storage.uri, spec.storage.region) == ("s3://admin/runs", "eu-central-1")
    assert spec.storage.credentials is not None
    assert spec.storage.credentials.secret_name == "mine"


def test_a_spec_is_judged_once_per_generation() -> None:
    judge = Judge(CONFIG)
    first, again = (run_of(resource(), CONFIG, judge) for _ in range(2))
    assert first.spec is again.spec
    edited = resource({"retry": {"limit": 9}}, generation=2)
    assert run_of(edited, CONFIG, judge) == run_of(edited, CONFIG)
    assert run_of(resource({"nodePools": []}, uid="another"), CONFIG, judge).problems != ()


def test_fields_of_a_newer_operator_are_ignored_and_told() -> None:
    raw = resource({"training": {**SPEC["training"], "curriculum": "easy"}, "fancy": {"on": True}})
    seen = run_of(raw, CONFIG)
    assert seen.spec is not None
    assert seen.ignored == ("spec.training.curriculum", "spec.fancy")
    decision = plan(Observed(seen), NOW, CONFIG)
    assert decision.status is not None
    accepted = condition_of(decision.status, ConditionType.ACCEPTED)
    assert accepted is not None
    assert accepted.status == "True"
    assert accepted.message.startswith(
        "ignored, since this operator is older than these fields: spec.training.curriculum"
    )
    assert run_of(resource(), CONFIG).ignored == ()
