"""The CEL rules of the CRD, each with a document it takes and one it refuses; the models take and refuse the same.

Evaluated with a CEL library of its own, as the API server does: on the stored document, at every place a rule stands.
"""

import copy
from collections.abc import Iterator
from typing import Any

import cel
import pytest
from pydantic import ValidationError

from dsft_api.crd import crd, freeze_rules
from dsft_api.resource import DeepSpeedFineTune
from dsft_api.spec import IDENTITY_FIELDS

Document = dict[str, Any]

SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
BEGAN = {"observedGeneration": 1, "startTime": "2026-01-01T00:00:00Z"}

MANIFEST: Document = {
    "apiVersion": "dsft.dev/v1alpha1",
    "kind": "DeepSpeedFineTune",
    "metadata": {"name": "chat"},
    "spec": {
        "model": {"uri": "hf://org/model", "task": "causal-lm"},
        "data": {"train": {"uri": "s3://bucket/train.jsonl", "format": "messages"}},
        "training": {"epochs": 1, "globalBatchSize": 8, "optimizer": {"learningRate": 1.0e-5}},
        "evaluation": {"everySteps": 10},
        "storage": {"uri": "s3://bucket/runs"},
    },
}
SOURCE = {"uri": "s3://bucket/a.jsonl", "format": "text"}
PROGRAM = {"model": None, "data": None, "training": None, "program": {"entrypoint": "mine.train:run"}}


def changed(changes: Document, document: Document = MANIFEST) -> Document:
    """A copy with the fields of `changes` set, by dotted path below spec; None removes."""
    copied = copy.deepcopy(document)
    for path, value in changes.items():
        *parents, name = path.split(".")
        place = copied["spec"]
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            place.pop(name)
        else:
            place[name] = value
    return copied


def named(name: str) -> Document:
    return {**MANIFEST, "metadata": {"name": name}}


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


# Message of the rule: what it takes, what it refuses.
RULES: dict[str, list[tuple[Document, Document]]] = {
    "metadata.name must be 40 characters at most and start with a letter": [
        (named("a" * 40), named("a" * 41)),
        (named("r2-d2"), named("2-fast")),
        (named("a"), named("a-")),
    ],
    "set model, data and training, or program alone": [
        (MANIFEST, changed({"model": None})),
        (changed(PROGRAM), changed({"program": PROGRAM["program"]})),
    ],
    "numLabels belongs to task sequence-classification; remove it": [
        (changed({"model.task": "sequence-classification", "model.numLabels": 3}), changed({"model.numLabels": 3})),
    ],
    "set exactly one of train and mixture": [
        (changed({"data": {"mixture": [SOURCE, SOURCE]}}), changed({"data.mixture": [SOURCE, SOURCE]})),
        (MANIFEST, changed({"data.train": None})),
    ],
    "set only one of eval and evalFraction": [
        (changed({"data.evalFraction": 0.1}), changed({"data.evalFraction": 0.1, "data.eval.split": "test"})),
    ],
    "set exactly one of fromModel, template and configMapRef": [
        (
            changed({"data.chatTemplate.template": "{{ x }}"}),
            changed({"data.chatTemplate.template": "{{ x }}", "data.chatTemplate.fromModel": "org/chat"}),
        ),
        (changed({"data.chatTemplate.fromModel": "org/chat"}), changed({"data.chatTemplate": {}})),
    ],
    "set exactly one of epochs and maxSteps": [
        (changed({"training.epochs": None, "training.maxSteps": 9}), changed({"training.maxSteps": 9})),
        (MANIFEST, changed({"training.epochs": None})),
    ],
    "set exactly one of value and valueFrom": [
        (changed({"env": [{"name": "A", "value": "1"}]}), changed({"env": [{"name": "A"}]})),
    ],
    "set exactly one of secretKeyRef and configMapKeyRef": [
        (
            changed({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}),
            changed({"env": [{"name": "A", "valueFrom": {}}]}),
        ),
    ],
    "set exactly one of secretRef and configMapRef": [
        (
            changed({"envFrom": [{"secretRef": {"name": "s"}}]}),
            changed({"envFrom": [{"secretRef": {"name": "s"}, "configMapRef": {"name": "c"}}]}),
        ),
    ],
    "set at most one of everySteps, everyMinutes and interval": [
        (changed({"checkpoint.interval": "auto"}), changed({"checkpoint": {"everySteps": 5, "everyMinutes": 1}})),
        (changed({"checkpoint": {}}), changed({"checkpoint": {"everySteps": 5, "interval": "auto"}})),
    ],
}
ROWS = [(message, *row) for message, rows in RULES.items() for row in rows]


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


IDENTITY_CHANGES = {
    "model": {"model.revision": "v2"},
    "data": {"data.maxLength": 1024},
    "training": {"training.optimizer.learningRate": 2.0e-5},
    "evaluation": {"evaluation.metric": "perplexity"},
    "storage": {"storage.uri": "s3://bucket/elsewhere"},
    "start_from": {"startFrom.run": "older"},
}


@pytest.mark.parametrize("changes", IDENTITY_CHANGES.values(), ids=IDENTITY_CHANGES)
def test_identity_is_frozen_once_the_run_began(changes):
    waiting, began = {**MANIFEST, "status": {"observedGeneration": 1}}, {**MANIFEST, "status": BEGAN}
    field = next(iter(changes)).split(".")[0]
    assert refusals(changed(changes, waiting), waiting) == []
    assert refusals(changed(changes, began), began) == [
        f"spec.{field} is frozen since the run began; make a new run with another name"
    ]
    # The way back is a change too.
    assert len(refusals(began, changed(changes, began))) == 1


def test_program_is_frozen_once_the_run_began():
    began = changed(PROGRAM, {**MANIFEST, "status": BEGAN})
    assert refusals(began, began) == []
    assert "spec.program is frozen" in refusals(changed({"program.entrypoint": "mine.train:other"}, began), began)[0]
    replaced = refusals({**MANIFEST, "status": BEGAN}, began)
    assert [message.split()[0] for message in replaced] == ["spec.model", "spec.data", "spec.training", "spec.program"]
    assert {*IDENTITY_CHANGES, "program"} == set(IDENTITY_FIELDS)


@pytest.mark.parametrize("part", [None, "evaluation", "storage"])
def test_part_that_is_removed_counts_as_changed(part):
    began = {**MANIFEST, "status": BEGAN}
    removed = changed({part: None}, began) if part else began
    assert len(refusals(removed, began)) == (1 if part else 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"suspend": True},
        {"execution.microBatchSize": 1, "deepspeed.offload.optimizer": "cpu"},
        {"nodePools": [{"name": "gpu", "nodes": 2}]},
        {"checkpoint.keepLast": 5, "retry.token": "again"},
        {"storage.uri": "s3://bucket/runs"},
    ],
)
def test_placement_and_policy_may_change_while_it_runs(changes):
    began = {**MANIFEST, "status": BEGAN}
    assert refusals(changed(changes, began), began) == []


def test_defaults_of_a_newer_crd_are_no_change():
    """What was written out by hand and what the API server fills in are the same to the freeze."""
    began = {**MANIFEST, "status": BEGAN}
    spelled_out = changed({"data.maxLength": 512, "training.seed": 42, "model.trustRemoteCode": False}, began)
    assert refusals(spelled_out, began) == []
