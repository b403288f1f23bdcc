"""The CEL rules as a table: for each message, a manifest that is taken and one that is refused with that message.

Data only. The rules are asked here by a CEL library, and in tests/apiserver by a real API server.
"""

import copy
from typing import Any

Document = dict[str, Any]

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


def program(**source: str) -> Document:
    return changed({**PROGRAM, "program": {**PROGRAM["program"], "source": source}})


ARCHIVE, DIGEST = "s3://bucket/code.tar.gz", f"sha256:{'0' * 64}"
GIT, REV = "https://example.com/code.git", "0" * 40

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
    "set only one of packing and groupByLength": [
        (changed({"data.packing": True}), changed({"data.packing": True, "data.groupByLength": True})),
        (changed({"data.groupByLength": True}), changed({"data.groupByLength": True, "data.packing": True})),
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
    "set exactly one of archive and git": [
        (program(archive=ARCHIVE, digest=DIGEST), program()),
        (program(git=GIT, rev=REV), program(archive=ARCHIVE, digest=DIGEST, git=GIT, rev=REV)),
    ],
    "archive needs digest, and digest archive": [
        (program(archive=ARCHIVE, digest=DIGEST), program(archive=ARCHIVE)),
        (program(git=GIT, rev=REV), program(git=GIT, rev=REV, digest=DIGEST)),
    ],
    "git needs rev, and rev git": [
        (program(git=GIT, rev=REV), program(git=GIT)),
        (program(archive=ARCHIVE, digest=DIGEST), program(archive=ARCHIVE, digest=DIGEST, rev=REV)),
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

# For each frozen field (by its name in the model), a change of it.
IDENTITY_CHANGES: dict[str, Document] = {
    "model": {"model.revision": "v2"},
    "data": {"data.maxLength": 1024},
    "training": {"training.optimizer.learningRate": 2.0e-5},
    "evaluation": {"evaluation.metric": "perplexity"},
    "storage": {"storage.uri": "s3://bucket/elsewhere"},
    "start_from": {"startFrom.run": "older"},
}
PLACEMENT_CHANGES: dict[str, Document] = {
    "execution": {"execution.microBatchSize": 2},
    "deepspeed": {"deepspeed.config": {"zero_optimization": {"reduce_bucket_size": 1000}}},
    "node_pools": {"nodePools": [{"name": "gpu", "nodes": 2, "podTemplate": {"spec": {"schedulerName": "mine"}}}]},
    "head": {"head.resources.requests": {"cpu": 2}},
    "image": {"image.trainer": "registry.example/trainer:2"},
    "service_account_name": {"serviceAccountName": "trainer"},
    "env": {"env": [{"name": "HF_HUB_OFFLINE", "value": "1"}]},
    "env_from": {"envFrom": [{"secretRef": {"name": "hub"}}]},
}
# Anyone may change these at any time.
POLICY_CHANGES: list[Document] = [
    {"suspend": True},
    {"checkpoint.keepLast": 5, "retry.token": "again"},
    {"export.mergeLora": False, "tracking.tensorboard": False},
    {"queue": {"name": "team-a"}, "deadlines.runSeconds": 3600, "keepClusterSeconds": 60},
    # No change at all, spelled out.
    {"storage.uri": "s3://bucket/runs"},
]
PROGRAM_CONFIG = {**PROGRAM, "program": {**PROGRAM["program"], "config": {"depth": {"layers": [1, 2]}}}}


def frozen_message(field: str) -> str:
    """What a user is told who changes `spec.<field>` of the run's identity too late."""
    return f"spec.{field} is frozen once the run began; make a new resource"


def placement_message(field: str) -> str:
    """What a user is told who changes where a run runs while it runs."""
    return (
        f"spec.{field} may change only while the run is Pending, Queued, Suspended or Failed; "
        "set spec.suspend to true, and change it in phase Suspended"
    )
