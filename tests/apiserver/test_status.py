"""Status by server-side apply, as the operator writes it: preconditions, ownership, and the whole of it kept."""

import pytest

from dsft_api.resource import DeepSpeedFineTune
from dsft_api.status import FineTuneStatus
from tests.apiserver.server import RefusedError
from tests.apiserver.whole_status import WHOLE, condition
from tests.unit.api.rule_table import MANIFEST


def test_whole_status_is_stored_as_it_is_written(runs):
    runs.create(MANIFEST)
    written = FineTuneStatus.model_validate(WHOLE, extra="forbid").to_wire()
    runs.apply_status("chat", written)
    stored = runs.get("chat")
    assert stored["status"] == written
    assert DeepSpeedFineTune.model_validate(stored).status == FineTuneStatus.model_validate(WHOLE)


def test_every_field_of_the_status_is_in_that(runs):
    properties = set(FineTuneStatus.model_json_schema(by_alias=True)["properties"])
    assert set(WHOLE) == properties


def test_what_is_left_out_of_the_next_apply_goes(runs):
    runs.create(MANIFEST)
    runs.apply_status("chat", {"phase": "Running", "message": "waits", "conditions": [condition("Ready")]})
    runs.apply_status("chat", {"phase": "Running", "conditions": [condition("Reconciling")]})
    status = runs.get("chat")["status"]
    assert "message" not in status
    assert [each["type"] for each in status["conditions"]] == ["Reconciling"]


def test_a_checkpoint_without_metrics_follows_one_with_them(runs):
    """The API server makes null of an empty object that takes the place of one with fields."""
    runs.create(MANIFEST)
    latest = WHOLE["checkpoints"]["latest"]
    for metrics in ({"accuracy": 0.9}, {}, {"loss": 0.1}):
        status = FineTuneStatus.model_validate({"checkpoints": {"latest": {**latest, "metrics": metrics}}})
        runs.apply_status("chat", status.to_wire())
        assert runs.get("chat")["status"]["checkpoints"]["latest"].get("metrics", {}) == metrics


def test_stale_version_is_a_conflict(runs):
    created = runs.create(MANIFEST)["metadata"]
    first = runs.apply_status("chat", {"attempt": 1}, resourceVersion=created["resourceVersion"])
    with pytest.raises(RefusedError) as refused:
        runs.apply_status("chat", {"attempt": 2}, resourceVersion=created["resourceVersion"])
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")
    assert runs.get("chat")["status"]["attempt"] == 1
    runs.apply_status("chat", {"attempt": 2}, resourceVersion=first["metadata"]["resourceVersion"])
    assert runs.get("chat")["status"]["attempt"] == 2


def test_a_finalizer_that_is_there_already_is_a_conflict_at_a_stale_version(runs):
    """The operator adds its finalizer before it makes a RayCluster: so nothing is made by an old look at the resource."""
    old = runs.create(MANIFEST)["metadata"]["resourceVersion"]
    now = runs.set_finalizers("chat", "dsft.dev/release-cluster", resourceVersion=old)["metadata"]["resourceVersion"]
    with pytest.raises(RefusedError) as refused:
        runs.set_finalizers("chat", "dsft.dev/release-cluster", resourceVersion=old)
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")
    again = runs.set_finalizers("chat", "dsft.dev/release-cluster", resourceVersion=now)
    assert again["metadata"]["resourceVersion"] == now, "nothing was changed"


def test_version_of_a_resource_that_had_the_name_before_is_a_conflict(runs):
    """A resource version is enough to tell namesakes apart; a uid in an applied status is not looked at."""
    gone = runs.create(MANIFEST)["metadata"]
    runs.delete("chat")
    runs.create(MANIFEST)
    with pytest.raises(RefusedError) as refused:
        runs.apply_status("chat", {"attempt": 2}, resourceVersion=gone["resourceVersion"])
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")
    assert "attempt" not in runs.get("chat")["status"]


def test_status_of_a_resource_that_is_gone_makes_none(runs):
    gone = runs.create(MANIFEST)["metadata"]
    runs.delete("chat")
    with pytest.raises(RefusedError) as refused:
        runs.apply_status("chat", {"attempt": 2}, resourceVersion=gone["resourceVersion"])
    assert refused.value.code == 404


def test_same_status_again_is_no_write(runs):
    runs.create(MANIFEST)
    first = runs.apply_status("chat", WHOLE)
    assert runs.apply_status("chat", WHOLE)["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


def test_nobody_else_takes_a_field_unasked(runs):
    runs.create(MANIFEST)
    runs.apply_status("chat", {"phase": "Running", "conditions": [condition("Ready")]})
    with pytest.raises(RefusedError) as refused:
        runs.apply_status("chat", {"phase": "Failed"}, manager="someone")
    assert refused.value.code == 409
    # A condition of another type is another entry.
    runs.apply_status("chat", {"conditions": [condition("CheckpointAvailable")]}, manager="someone")
    assert {each["type"] for each in runs.get("chat")["status"]["conditions"]} == {"Ready", "CheckpointAvailable"}


def test_only_the_status_is_written(runs):
    created = runs.create(MANIFEST)
    runs.apply_status("chat", {"phase": "Running"})
    stored = runs.get("chat")
    assert stored["spec"] == created["spec"]
    owner = next(each for each in stored["metadata"]["managedFields"] if each["manager"] == "dsft-operator")
    assert (owner["operation"], owner["subresource"]) == ("Apply", "status")
    assert list(owner["fieldsV1"]) == ["f:status"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ({"phase": "Working"}, 'status.phase: Unsupported value: "Working"'),
        ({"conditions": [{**condition("Ready"), "reason": "not camel"}]}, "status.conditions[0].reason"),
        ({"conditions": [{"type": "Ready"}]}, "status.conditions[0].lastTransitionTime: Required value"),
        ({"message": "x" * 4097}, "status.message: Too long"),
    ],
)
def test_status_that_the_model_does_not_know_is_refused(runs, status, message):
    runs.create(MANIFEST)
    with pytest.raises(RefusedError) as refused:
        runs.apply_status("chat", status)
    assert message in str(refused.value)
