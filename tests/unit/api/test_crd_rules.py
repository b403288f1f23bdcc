"""The CEL rules of the CRD, each with a document it takes and one it refuses; the models take and refuse the same.

Evaluated with a CEL library of its own, as the API server does: on the stored document, at every place a rule stands.
"""

import copy
from collections.abc import Iterator
from typing import Any

import cel
import pytest
from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from dsft_api.conditions import Phase
from dsft_api.crd import crd, freeze_rules
from dsft_api.resource import DeepSpeedFineTune
from dsft_api.spec import IDENTITY_FIELDS, PLACEMENT_FIELDS, FineTuneSpec
from tests.unit.api.rule_table import (
    IDENTITY_CHANGES,
    MANIFEST,
    PLACEMENT_CHANGES,
    POLICY_CHANGES,
    PROGRAM_CONFIG,
    ROWS,
    RULES,
    Document,
    changed,
    frozen_message,
    placement_message,
)

SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def in_phase(phase: str) -> Document:
    """The manifest of a run that has begun, in some phase."""
    return {**MANIFEST, "status": {"observedGeneration": 1, "attempt": 1, "phase": str(phase)}}


def places(document: Any, schema: Document) -> Iterator[tuple[Document, Document]]:
    """Every object of the document that has rules, with its schema, after the defaults are set."""
    if isinstance(document, list):
        for item in document:
            yield from places(item, schema["items"])
    elif isinstance(document, dict) and "properties" in schema:
        for name, child in schema["properties"].items():
            if "default" in child:
                document.setdefault(name, copy.deepcopy(child["default"]))
            if name in document:
                yield from places(document[name], child)
        yield document, schema


def refusals(document: Document, old: Document | None = None) -> list[str]:
    """The messages of the rules that refuse the document; transition rules are asked only of an update."""
    found = []
    for self, schema in list(places(copy.deepcopy(document), SCHEMA)):
        for rule in schema.get("x-kubernetes-validations", ()):
            if "oldSelf" in rule["rule"]:
                asked = old is not None and not cel.evaluate(rule["rule"], {"self": self, "oldSelf": stored(old)})
            else:
                asked = not cel.evaluate(rule["rule"], {"self": self})
            if asked:
                found.append(rule["message"])
    return found


def stored(document: Document) -> Document:
    copied = copy.deepcopy(document)
    list(places(copied, SCHEMA))
    return copied


@pytest.mark.parametrize(("message", "accepted", "refused"), ROWS)
def test_crd_and_model_agree(message, accepted, refused):
    assert refusals(accepted) == []
    DeepSpeedFineTune.model_validate(accepted, extra="forbid")
    assert refusals(refused) == [message]
    with pytest.raises(ValidationError):
        DeepSpeedFineTune.model_validate(refused, extra="forbid")


def test_every_rule_is_in_the_table():
    def messages(schema: Document) -> Iterator[str]:
        yield from (rule["message"] for rule in schema.get("x-kubernetes-validations", ()))
        for child in (*schema.get("properties", {}).values(), *filter(None, [schema.get("items")])):
            yield from messages(child)

    assert set(messages(SCHEMA)) == {*RULES, *(rule.message for rule in freeze_rules())}


@pytest.mark.parametrize(("field", "changes"), IDENTITY_CHANGES.items(), ids=IDENTITY_CHANGES)
def test_identity_is_frozen_once_the_run_began(field, changes):
    message = frozen_message(to_camel(field))
    for status in ({"observedGeneration": 1}, {"attempt": 0, "phase": "Pending"}):
        waiting = {**MANIFEST, "status": status}
        assert refusals(changed(changes, waiting), waiting) == []
    for phase in Phase:
        began = in_phase(phase)
        assert refusals(changed(changes, began), began) == [message]
        # The way back is a change too.
        assert refusals(began, changed(changes, began)) == [message]


def test_program_is_frozen_once_the_run_began():
    began = changed(PROGRAM_CONFIG, in_phase("Running"))
    assert refusals(began, began) == []
    assert refusals(changed({"program.entrypoint": "mine.train:other"}, began), began) == [frozen_message("program")]
    deeper = changed({"program.config": {"depth": {"layers": [1, 3]}}}, began)
    assert refusals(deeper, began) == [frozen_message("program")]
    assert refusals(in_phase("Running"), began) == [
        frozen_message(field) for field in ("model", "data", "training", "program")
    ]
    assert {*IDENTITY_CHANGES, "program"} == set(IDENTITY_FIELDS)


@pytest.mark.parametrize(("field", "changes"), PLACEMENT_CHANGES.items(), ids=PLACEMENT_CHANGES)
def test_placement_changes_only_while_nothing_runs(field, changes):
    for phase in Phase:
        old = in_phase(phase)
        expected = [] if phase in ("Pending", "Queued", "Suspended", "Failed") else [placement_message(to_camel(field))]
        assert refusals(changed(changes, old), old) == expected, phase
        assert refusals(old, changed(changes, old)) == expected, phase
    unseen = {**MANIFEST, "status": {"observedGeneration": -1}}
    assert refusals(changed(changes, unseen), unseen) == []


def test_every_field_belongs_to_one_group():
    assert set(PLACEMENT_CHANGES) == set(PLACEMENT_FIELDS)
    assert not set(PLACEMENT_FIELDS) & set(IDENTITY_FIELDS)
    policy = set(FineTuneSpec.model_fields) - set(PLACEMENT_FIELDS) - set(IDENTITY_FIELDS)
    assert policy == {
        "checkpoint",
        "export",
        "tracking",
        "suspend",
        "preflight",
        "queue",
        "retry",
        "deadlines",
        "keep_cluster_seconds",
    }


@pytest.mark.parametrize("part", [None, "evaluation", "storage"])
def test_part_that_is_removed_counts_as_changed(part):
    began = in_phase("Running")
    removed = changed({part: None}, began) if part else began
    assert refusals(removed, began) == ([frozen_message(part)] if part else [])


@pytest.mark.parametrize("changes", POLICY_CHANGES)
def test_policy_may_change_at_any_time(changes):
    for phase in Phase:
        old = in_phase(phase)
        assert refusals(changed(changes, old), old) == []


def test_defaults_of_a_newer_crd_are_no_change():
    """What was written out by hand and what the API server fills in are the same to the freeze."""
    began = in_phase("Running")
    spelled_out = changed({"data.maxLength": 512, "training.seed": 42, "model.trustRemoteCode": False}, began)
    assert refusals(spelled_out, began) == []
