"""The CEL rules, asked of the API server itself: the table of tests/unit/api, with the exact messages."""

import pytest
from pydantic.alias_generators import to_camel

from dsft_api.conditions import Phase
from tests.apiserver.server import RefusedError
from tests.unit.api.rule_table import (
    IDENTITY_CHANGES,
    MANIFEST,
    PLACEMENT_CHANGES,
    POLICY_CHANGES,
    PROGRAM,
    PROGRAM_CONFIG,
    ROWS,
    changed,
    frozen_message,
    placement_message,
)


def refusals(call, document) -> list[str]:
    """The messages that the server refuses a document with, as a user reads them; none if it takes it.

    What Kubernetes itself says about a name that no object may have is left out.
    """
    try:
        call(document, dry_run=True)
    except RefusedError as refused:
        # What is no message of a rule is shown as it is.
        messages = [message for messages in refused.causes.values() for message in messages] or [str(refused)]
        return [message for message in messages if "RFC 1123" not in message]
    return []


def told(messages: list[str], expected: list[str]) -> bool:
    """Whether these are the messages, each behind the server's own `Invalid value: ...: `."""
    return len(messages) == len(expected) and all(
        any(message.endswith(f": {text}") for message in messages) for text in expected
    )


@pytest.mark.parametrize(("message", "accepted", "refused"), ROWS)
def test_rule(runs, message, accepted, refused):
    assert refusals(runs.create, accepted) == []
    assert told(refusals(runs.create, refused), [message]), refusals(runs.create, refused)


def began(runs, document=MANIFEST, **status):
    """A stored run with this status."""
    runs.create(document)
    return runs.apply_status("chat", {"observedGeneration": 1, **status})


@pytest.mark.parametrize(("field", "changes"), IDENTITY_CHANGES.items(), ids=IDENTITY_CHANGES)
def test_identity_is_free_until_the_first_attempt(runs, field, changes):
    field = to_camel(field)
    waiting = began(runs, phase="Pending")
    assert refusals(runs.replace, changed(changes, waiting)) == []
    waiting = runs.apply_status("chat", {"phase": "Pending", "attempt": 0})
    assert refusals(runs.replace, changed(changes, waiting)) == []

    frozen = runs.apply_status("chat", {"phase": "Failed", "attempt": 1})
    expected = [frozen_message(field)]
    assert told(refusals(runs.replace, changed(changes, frozen)), expected)
    with pytest.raises(RefusedError) as refused:
        runs.replace(changed(changes, frozen))
    assert list(refused.value.causes) == [f"spec.{field}"]
    if field in frozen["spec"]:
        assert frozen_message(field) in str(refusals(runs.replace, changed({field: None}, frozen)))


def test_program_is_frozen_inside_its_free_form_config_too(runs):
    old = began(runs, changed(PROGRAM_CONFIG), phase="Running", attempt=1)
    for changes in (
        {"program.entrypoint": "mine.train:other"},
        {"program.config": {"depth": {"layers": [1, 3]}}},
        {"program.config": None},
    ):
        assert told(refusals(runs.replace, changed(changes, old)), [frozen_message("program")]), changes
    builtin = {part: MANIFEST["spec"][part] for part in ("model", "data", "training")}
    replaced = refusals(runs.replace, changed({"program": None, **builtin}, old))
    assert told(replaced, [frozen_message(field) for field in ("model", "data", "training", "program")])
    assert PROGRAM["program"]["entrypoint"] == old["spec"]["program"]["entrypoint"]


@pytest.mark.parametrize(("field", "changes"), PLACEMENT_CHANGES.items(), ids=PLACEMENT_CHANGES)
def test_placement_changes_only_while_nothing_runs(runs, field, changes):
    old = began(runs)
    assert refusals(runs.replace, changed(changes, old)) == []
    for phase in Phase:
        old = runs.apply_status("chat", {"phase": phase.value, "attempt": 1})
        expected = [] if phase in ("Pending", "Queued", "Suspended", "Failed") else [placement_message(to_camel(field))]
        assert told(refusals(runs.replace, changed(changes, old)), expected), phase


def test_placement_is_compared_to_its_depth(runs):
    pool = {"name": "gpu", "podTemplate": {"spec": {"schedulerName": "mine"}}}
    old = began(runs, changed({"nodePools": [pool], "env": [{"name": "A", "value": "1"}]}), phase="Running", attempt=1)
    other = {**pool, "podTemplate": {"spec": {"schedulerName": "other"}}}
    for changes, fields in (
        ({"nodePools": [other]}, ["nodePools"]),
        ({"nodePools": None}, ["nodePools"]),
        ({"env": [{"name": "A", "value": "2"}]}, ["env"]),
        ({"env": None, "nodePools": [other]}, ["env", "nodePools"]),
    ):
        expected = [placement_message(field) for field in fields]
        assert told(refusals(runs.replace, changed(changes, old)), expected), changes


@pytest.mark.parametrize("changes", POLICY_CHANGES)
def test_policy_may_change_at_any_time(runs, changes):
    old = began(runs, phase="Running", attempt=1)
    assert refusals(runs.replace, changed(changes, old)) == []


def test_largest_resource_stays_within_the_cost_that_the_server_allows(runs):
    """The rules compare whole parts; their cost at run time is bounded per request."""
    env = [{"name": f"V{number}", "value": "x" * 4096} for number in range(64)]
    pools = [
        {
            "name": f"p{number}",
            "nodeSelector": {f"label-{each}": "y" * 63 for each in range(32)},
            "podTemplate": {"spec": {f"field{each}": "z" * 512 for each in range(64)}},
        }
        for number in range(8)
    ]
    old = began(runs, changed({"env": env, "nodePools": pools}), phase="Running", attempt=1)
    assert refusals(runs.replace, changed({"suspend": True}, old)) == []
    last = {**env[-1], "value": "y" * 4096}
    assert told(refusals(runs.replace, changed({"env": [*env[:-1], last]}, old)), [placement_message("env")])
