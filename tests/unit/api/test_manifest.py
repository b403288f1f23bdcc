"""Every way a manifest can miss the schema, and what its writer is told."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsft_api.manifest import ManifestError, Problem, parse
from dsft_api.resource import Metadata
from dsft_api.spec import FineTuneSpec
from dsft_api.wording import PATTERNS

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))


def problems_of(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ManifestError) as raised:
        parse(text, "run.yaml")
    return raised.value.problems


# Edits of a right manifest -> field, part of the message, part of the remedy. One mistake each, one problem each.
MISFITS = [
    ({"apiVersion": "dsft.dev/v1"}, "apiVersion", "is not what dsft runs", "write apiVersion: dsft.dev/v1alpha1"),
    ({"apiVersion": None}, "apiVersion", "is missing", "write apiVersion: dsft.dev/v1alpha1"),
    ({"kind": "DeepspeedFinetune"}, "kind", "is not what dsft runs", "write kind: DeepSpeedFineTune"),
    ({"metadata": None}, "metadata", "is missing", "add metadata"),
    ({"metadata.name": None}, "metadata.name", "is missing", "add name: Name of the run"),
    ({"metadata.name": "Chat_1"}, "metadata.name", "no valid name of a run", "lower-case letters"),
    ({"metadata.name": "a" * 41}, "metadata.name", "too long", "40 characters at most"),
    ({"metadata.name": None, "metadata.generateName": "x-"}, "metadata.generateName", "API server", "write name"),
    ({"metadata.lables": {}}, "metadata.lables", "did you mean labels?", "rename it to labels"),
    ({"metadata.labels": {"team": 7}}, "metadata.labels.team", "must be text", "quotes"),
    ({"specs": {}}, "specs", "did you mean spec?", "rename"),
    ({"spec": None}, "spec", "is missing", "add spec"),
    ({"spec": []}, "spec", "must be a mapping", "NAME: VALUE"),
    ({"spec.model": None}, "spec", "contradict", "set model"),
    ({"spec.model.uri": None}, "spec.model.uri", "is missing", "hf://ORG/NAME"),
    ({"spec.model.uri": "bert-base"}, "spec.model.uri", "is no URI", "hf://ORG/NAME"),
    ({"spec.model.uri": 7}, "spec.model.uri", "must be text", "quotes"),
    ({"spec.model.task": "causal_lm"}, "spec.model.task", "one of causal-lm, seq", "write causal-lm"),
    ({"spec.model.task": "vision"}, "spec.model.task", "must be one of", "use causal-lm or sequence-classification"),
    ({"spec.model.numLabels": 3}, "spec.model", "numLabels belongs to task sequence-classification", "remove it"),
    (
        {"spec.checkpoint": {"everySteps": 1, "interval": "auto"}},
        "spec.checkpoint",
        "contradict",
        "at most one of every",
    ),
    ({"spec.env": [{"name": "A", "value": "1"}] * 2}, "spec.env", "name 'A' is used more than once", "give each item"),
    ({"spec.nodePools": [{"name": "a"}] * 2}, "spec.nodePools", "name 'a' is used more than once", "give each item"),
    ({"spec.data.train": None}, "spec.data", "one is missing", "exactly one of train and mixture"),
    ({"spec.data.evalFraction": 0.1}, "spec.data", "contradict", "only one of eval and evalFraction"),
    (
        {"spec.data.packing": True, "spec.data.groupByLength": True},
        "spec.data",
        "contradict",
        "only one of packing and groupByLength",
    ),
    ({"spec.data.evalFraction": 0.9, "spec.data.eval": None}, "spec.data.evalFraction", "at most 0.5", "at most 0.5"),
    ({"spec.data.train.columns": {"txt": "a"}}, "spec.data.train.columns.txt", "did you mean text?", "rename"),
    ({"spec.data.chatTemplate": {}}, "spec.data.chatTemplate", "one is missing", "exactly one of fromModel"),
    ({"spec.training.epochs": "3"}, "spec.training.epochs", "must be a number", "without quotes"),
    ({"spec.training.epochs": 0}, "spec.training.epochs", "must be more than 0", "more than 0"),
    ({"spec.training.maxSteps": 10}, "spec.training", "contradict", "exactly one of epochs and maxSteps"),
    ({"spec.training.globalBatchSize": 64.5}, "spec.training.globalBatchSize", "whole number", "decimal point"),
    ({"spec.training.globalBatchSize": True}, "spec.training.globalBatchSize", "whole number", "digits"),
    ({"spec.training.batch": 1}, "spec.training.batch", "unknown field", "known here: epochs"),
    ({"spec.training.learningRate": 1}, "spec.training.learningRate", "here", "belongs to spec.training.optimizer"),
    ({"spec.training.optimizer": {"learning_rate": 1e-5}}, "spec.training.optimizer.learning_rate", "Rate?", "rename"),
    ({"spec.training.optimizer.betas": [0.9]}, "spec.training.optimizer.betas", "too few items", "2 items at least"),
    ({"spec.training.optimizer.betas": 0.9}, "spec.training.optimizer.betas", "must be a list", "after '- '"),
    ({"spec.execution.activationCheckpointing": "yes"}, "spec.execution.activationCheckpointing", "true or", "quotes"),
    ({"spec.deepspeed.stage": 2}, "spec.deepspeed.stage", "must be 3", "use 3"),
    ({"spec.deepspeed.config": []}, "spec.deepspeed.config", "must be a mapping", "NAME: VALUE"),
    ({"spec.nodePools": {"name": "a"}}, "spec.nodePools", "must be a list", "items"),
    ({"spec.nodePools[0].name": "GPU"}, "spec.nodePools[0].name", "is no valid name", "lower-case"),
    ({"spec.nodePools[0].node": 2}, "spec.nodePools[0].node", "did you mean nodes?", "rename"),
    (
        {"spec.nodePools[0].resources": {"requests": {"memory": "lots"}}},
        "spec.nodePools[0].resources.requests.memory",
        "no Kubernetes quantity",
        "64Gi",
    ),
    ({"spec.env": [{"name": "A-B", "value": "1"}]}, "spec.env[0].name", "environment variable", "not starting with"),
    ({"spec.env": [{"name": "A"}]}, "spec.env[0]", "one is missing", "exactly one of value and valueFrom"),
    ({"spec.env": [{"name": "A", "value": 1}]}, "spec.env[0].value", "must be text", "quotes"),
    ({"spec.storage.endpointUrl": "minio:9000"}, "spec.storage.endpointUrl", "is no endpoint", "https://HOST:PORT"),
    ({"spec.storage.volume": {"claimName": "c", "mountPath": "data"}}, "spec.storage.volume.mountPath", "path", "/F"),
    ({"spec.serviceAccountName": "a" * 254}, "spec.serviceAccountName", "too long", "253 characters"),
]


@pytest.mark.parametrize(
    ("edits", "field", "message", "remedy"), MISFITS, ids=[f"{row[1]}-{row[2]}" for row in MISFITS]
)
def test_each_misfit_is_one_problem_with_a_way_out(manifest, edits, field, message, remedy):
    (problem,) = problems_of(manifest(edits))
    assert problem.field == field
    assert message in problem.message
    assert remedy in problem.remedy
    assert problem.line is not None


# Texts that are wrong before any field is.
TEXTS = [
    ("", "is empty", None),
    ("# nothing\n---\n", "is empty", None),
    ("just words", "is no mapping", 1),
    ("- a\n- b", "is no mapping", 1),
    ("a: 1\n---\nb: 2\n", "holds 2 documents", 3),
    ("a: b: c", "not valid YAML: mapping values are not allowed here", 1),
    ("a:\n\t- b", "not valid YAML: found character '\\t' that cannot start any token", 2),
    ("a: 'open", "not valid YAML: found unexpected end of stream", 1),
    ("a: *nowhere", "not valid YAML: found undefined alias", 1),
    ("a: !!python/object:os.system {}", "could not determine a constructor for the tag", 1),
    ("a: !!binary aGk=", "could not determine a constructor for the tag", 1),
    ("? [a]\n: b", "found unhashable key", 1),
    ("a: \x07", "special characters are not allowed", None),
    ("&a [*a]", "nested too deeply", None),
    ("[" * 2000, "nested too deeply", None),
]


@pytest.mark.parametrize(("text", "message", "line"), TEXTS, ids=[repr(row[0][:20]) for row in TEXTS])
def test_unreadable_text_is_one_problem(text, message, line):
    (problem,) = problems_of(text)
    assert message in problem.message
    assert (problem.field, problem.line) == ("manifest", line)


def test_aliases_that_multiply_end_soon():
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 10))
    (problem,) = problems_of(f"l0: &l0 [1]\n{levels}")
    assert "far too large" in problem.message


def test_free_form_fields_have_a_bounded_depth(manifest):
    text = manifest({"spec.deepspeed.config": {"data_types": "DEEP"}})
    (problem,) = problems_of(text.replace("DEEP", "{k: " * 100 + "1" + "}" * 100))
    assert "nested too deeply" in problem.message


def test_broken_unicode_is_refused_without_the_text(manifest):
    (problem,) = problems_of(manifest({"spec.model.revision": "REV"}).replace("REV", r'"\ud800"'))
    assert "no valid Unicode" in problem.message
    assert problem.value is None


def test_equal_keys_are_refused_with_both_lines(manifest):
    text = manifest({}).replace("    epochs: 3\n", "    epochs: 3\n    epochs: 4\n")
    (problem,) = problems_of(text)
    line = text.splitlines().index("    epochs: 4") + 1
    assert (problem.field, problem.line) == ("spec.training.epochs", line)
    assert f"first in line {line - 1}" in problem.message


SIX_MISTAKES = """\
apiVersion: dsft.dev/v1alpha1
kind: DeepSpeedFineTune
metadata:
  name: Six
spec:
  model:
    uri: hf://org/model
    task: causal-lm
  data:
    train:
      uri: gopher://old/data
      format: pair
  training:
    epochs: "3"
    globalBatchSize: 64
    optimizer:
      learningrate: 1e-5
  execution:
    microBatchSize: 0
  deepspeed:
    config:
      fp16: {enabled: true}
    offload:
      params: cpu
"""


def test_six_mistakes_and_more_are_told_at_once_with_their_lines():
    assert [(problem.line, problem.field) for problem in problems_of(SIX_MISTAKES)] == [
        (4, "metadata.name"),
        (11, "spec.data.train.uri"),
        (12, "spec.data.train.format"),
        (14, "spec.training.epochs"),
        (17, "spec.training.optimizer.learningrate"),
        (19, "spec.execution.microBatchSize"),
        (22, "spec.deepspeed.config.fp16"),
        (24, "spec.deepspeed.offload.params"),
    ]


def test_the_error_reads_as_a_list_of_places_and_remedies():
    with pytest.raises(ManifestError) as raised:
        parse(SIX_MISTAKES, "six.yaml")
    lines = str(raised.value).splitlines()
    assert "six.yaml:14: spec.training.epochs: must be a number (got '3') -> write a number without quotes" in lines
    assert len(lines) == len(raised.value.problems)


def test_program_excludes_the_builtin_sections(manifest):
    first, *_ = problems_of(manifest({"spec.program.entrypoint": "a:b"}))
    assert (first.field, first.remedy) == (
        "spec",
        "program replaces model, data and training: remove model, data, training",
    )


def test_a_typo_of_a_required_field_is_told_once():
    (problem,) = [p for p in problems_of(SIX_MISTAKES) if p.field.startswith("spec.training.optimizer")]
    assert problem.remedy == "rename it to learningRate"


def test_another_kind_of_object_is_not_judged_further():
    fields = [problem.field for problem in problems_of("apiVersion: v1\nkind: Pod\nspec: {containers: []}")]
    assert fields == ["apiVersion", "kind"]


SECRET = "hunter2hunter2"
LEAKS = [
    {"spec.env": [{"name": "HF_TOKEN", "value": SECRET}]},
    {"spec.env": [{"name": "HF_TOKEN", "vaule": SECRET}]},
    {"spec.env": [{"name": "PIN", "value": 4711}]},
    {"spec.storage.secretKey": SECRET},
    {"spec.storage.endpointUrl": f"https://user:{SECRET}@minio"},
    {"spec.storage.uri": f"s3://user:{SECRET}@bucket/x"},
    {"spec.model.uri": f"https://{SECRET}@hub/x"},
]


@pytest.mark.parametrize("edits", LEAKS, ids=str)
def test_no_error_repeats_a_secret(manifest, edits):
    with pytest.raises(ManifestError) as raised:
        parse(manifest(edits))
    told = repr(raised.value.problems) + str(raised.value)
    assert SECRET not in told
    assert "4711" not in told


def test_numbers_are_read_as_kubernetes_reads_them(manifest):
    text = manifest({}).replace("1.0e-05", "1e-5").replace("globalBatchSize: 64", "globalBatchSize: 6_4")
    resource = parse(text.replace("name: chat", "name: chat\n  labels: {date: 2024-01-01, time: 1:30}"))
    assert resource.spec.training is not None
    assert resource.spec.training.optimizer.learning_rate == 1e-5
    assert resource.spec.training.global_batch_size == 64
    assert resource.metadata.labels == {"date": "2024-01-01", "time": "1:30"}


def test_what_kubectl_prints_can_be_read_back(manifest):
    resource = parse(
        manifest(
            {
                "metadata.creationTimestamp": "2026-01-01T00:00:00Z",
                "metadata.managedFields": [{"manager": "kubectl"}],
                "metadata.ownerReferences": [],
                "metadata.finalizers": ["dsft.dev/cleanup"],
                "metadata.resourceVersion": "12",
                "metadata.uid": "u",
                "metadata.generation": 3,
                "status": {"phase": "Running", "unheard": "of"},
            }
        )
    )
    assert resource.status is None
    assert (resource.metadata.uid, resource.metadata.generation) == ("u", 3)


def test_anchors_and_merge_keys_are_yaml_too():
    text = """\
apiVersion: dsft.dev/v1alpha1
kind: DeepSpeedFineTune
metadata: {name: chat}
spec:
  model: {uri: hf://org/model, task: causal-lm}
  data: {train: {uri: hf://org/data, format: text}}
  training: {maxSteps: 5, globalBatchSize: 2, optimizer: {learningRate: 0.1}}
  nodePools:
  - &pool {name: a, nodes: 1}
  - {<<: *pool, name: b}
"""
    assert [pool.name for pool in parse(text).spec.node_pools] == ["a", "b"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_right(example):
    assert parse(example.read_text(), example.name).metadata.name


def test_there_are_examples():
    assert EXAMPLES


def patterns(schema: object) -> Iterator[str]:
    """Every pattern in a JSON schema."""
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    if isinstance(schema, dict) and isinstance(pattern := schema.get("pattern"), str):
        yield pattern
    for part in parts:
        yield from patterns(part)


def test_every_pattern_of_the_models_has_words():
    used = {*patterns(FineTuneSpec.model_json_schema()), *patterns(Metadata.model_json_schema())}
    assert used == PATTERNS.keys()
