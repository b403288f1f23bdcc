"""Fields that fit the schema and not each other, secrets in plain text, and DeepSpeed keys that may not be set."""

import pytest

from dsft_api.checks import check
from dsft_api.conditions import Reason
from dsft_api.manifest import ManifestError, Problem, parse
from dsft_api.plain_secrets import without_secrets

PAIR = {
    "spec.model.task": "sequence-classification",
    "spec.data.train.format": "pair",
}
NO_EVAL = {"spec.data.eval": None}


def mixture(**fields: object) -> dict[str, object]:
    """Two data sets, the second one with these fields."""
    first, second = ({"uri": f"hf://org/{name}", "format": "text"} for name in "ab")
    return {"spec.data": {"mixture": [first, {**second, **fields}]}}


REDACTED = "[redacted]"


def problems_of(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ManifestError) as raised:
        parse(text)
    return raised.value.problems


# Edits of a right manifest -> field, part of the message, part of the remedy. One mistake each, one problem each.
CONTRADICTIONS = [
    # URIs
    ({"spec.model.uri": "gs://b/m"}, "spec.model.uri", "gs:// is not known here", "hf://, s3://, file://, python://"),
    ({"spec.storage.uri": "hf://org/x"}, "spec.storage.uri", "hf:// is not known here", "s3://, file://"),
    ({"spec.model.uri": "hf://a/b/c"}, "spec.model.uri", "no hf:// URI", "hf://ORG/NAME"),
    ({"spec.model.uri": "hf://org/model@main"}, "spec.model.uri", "no hf:// URI", "revision in a field of its own"),
    ({"spec.data.train.uri": "hf://datasets/a/b"}, "spec.data.train.uri", "no hf:// URI", "hf://ORG/NAME"),
    ({"spec.storage.uri": "s3:///prefix"}, "spec.storage.uri", "no s3:// URI", "s3://BUCKET/PATH"),
    ({"spec.storage.uri": "file://runs"}, "spec.storage.uri", "no file:// URI", "three slashes"),
    ({"spec.model.uri": "python://package"}, "spec.model.uri", "no python:// URI", "python://PACKAGE/PATH"),
    ({"spec.model.uri": "python://package/../x"}, "spec.model.uri", "no python:// URI", "python://PACKAGE/PATH"),
    (
        {"spec.data.chatTemplate.fromModel": "gs://b/m"},
        "spec.data.chatTemplate.fromModel",
        "gs:// is not known here",
        "hf://",
    ),
    ({"spec.data.eval.uri": "ftp://h/x"}, "spec.data.eval.uri", "ftp:// is not known here", "file://"),
    (
        {"spec.model": {"uri": "file:///m", "revision": "v1", "task": "causal-lm"}},
        "spec.model.revision",
        "hf:// URIs only",
        "remove it",
    ),
    (
        {"spec.data.train": {"uri": "s3://bucket/rows", "subset": "x", "format": "messages"}},
        "spec.data.train.subset",
        "hf:// URIs only",
        "remove it",
    ),
    (
        {"spec.data.eval": {"uri": "file:///d/test.jsonl.gz", "split": "test"}},
        "spec.data.eval.split",
        "a file of rows has no splits",
        "remove it",
    ),
    # data and task
    (
        {"spec.model.trustRemoteCode": True, "spec.data.loader": "ray-data"},
        "spec.data.loader",
        "does not fit spec.model.trustRemoteCode",
        "use loader torch",
    ),
    ({"spec.data.train.format": "pair"}, "spec.data.train.format", "task causal-lm", "text or prompt_completion or"),
    ({"spec.data.eval.format": "classification"}, "spec.data.eval.format", "task causal-lm", "use text"),
    (
        {"spec.data.train.columns": {"label": "y"}},
        "spec.data.train.columns.label",
        "not read by format messages",
        "reads messages",
    ),
    ({"spec.data.lossOn": "completion"}, "spec.data.lossOn", "fit format messages", "assistant or all"),
    ({**PAIR, "spec.data.lossOn": "all"}, "spec.data.lossOn", "does not fit format pair", "remove it"),
    (
        {"spec.execution.attention": "flash_attention_2", "spec.execution.device": "cpu"},
        "spec.execution.attention",
        "is for GPUs only",
        "use sdpa or eager",
    ),
    (
        {"spec.execution.attention": "flash_attention_2", "spec.training.precision": "fp32"},
        "spec.execution.attention",
        "needs bf16 or fp16",
        "use sdpa or eager with fp32",
    ),
    ({**PAIR, "spec.data.packing": True}, "spec.data.packing", "does not fit task sequence-cl", "remove it"),
    *(
        (
            {
                "spec.data.streaming": True,
                "spec.data.train.uri": "s3://rows/chat",
                **NO_EVAL,
                f"spec.data.{name}": value,
            },
            f"spec.data.{name}",
            "does not go together with spec.data.streaming",
            f"remove {name}, or streaming",
        )
        for name, value in {"evalFraction": 0.1, "groupByLength": True, "loader": "ray-data"}.items()
    ),
    (
        {"spec.data.streaming": True, "spec.data.train.uri": "hf://org/rows"},
        "spec.data.train.uri",
        "cannot be streamed",
        "JSON lines, CSV or Parquet",
    ),
    (
        {**PAIR, "spec.evaluation.samples": {}},
        "spec.evaluation.samples",
        "does not fit task sequence-classification",
        "remove it",
    ),
    ({**NO_EVAL, "spec.evaluation.samples": {}}, "spec.evaluation.samples", "no evaluation data", "add spec.data.eval"),
    (
        {**PAIR, "spec.execution.lossKernel": "chunked"},
        "spec.execution.lossKernel",
        "does not fit task sequence-classification",
        "write standard",
    ),
    (
        {"spec.data.train.format": "text", "spec.data.chatTemplate": {"fromModel": "a/b"}},
        "spec.data.chatTemplate",
        "format messages only",
        "remove it",
    ),
    ({"spec.data.eval": {}}, "spec.data.eval", "is the training data itself", "another split"),
    (
        {"spec.data.eval": {"uri": "hf://org/data", "revision": "main"}},
        "spec.data.eval",
        "is the training data itself",
        "evalFraction",
    ),
    # mixtures
    (mixture(uri="gs://b/m"), "spec.data.mixture[1].uri", "gs:// is not known here", "hf://"),
    (mixture(format="pair"), "spec.data.mixture[1].format", "task causal-lm", "text or prompt_completion or"),
    (mixture(columns={"label": "y"}), "spec.data.mixture[1].columns.label", "not read by format text", "reads text"),
    (mixture(uri="s3://bucket/rows", subset="x"), "spec.data.mixture[1].subset", "hf:// URIs only", "remove it"),
    (
        {**mixture(), "spec.data.eval": {"uri": "hf://org/b", "format": "text"}},
        "spec.data.eval",
        "is the training data itself",
        "another split",
    ),
    (
        {**mixture(), "spec.data.eval": {"split": "test", "format": "text"}},
        "spec.data.eval.uri",
        "is missing",
        "add uri",
    ),
    ({**mixture(), "spec.data.eval": {"uri": "hf://org/c"}}, "spec.data.eval.format", "is missing", "add format"),
    # evaluation
    (
        {**NO_EVAL, "spec.evaluation.everySteps": 5},
        "spec.evaluation.everySteps",
        "no evaluation data",
        "spec.data.eval",
    ),
    (
        {**NO_EVAL, "spec.evaluation.metric": "perplexity"},
        "spec.evaluation.metric",
        "no evaluation data",
        "evalFraction",
    ),
    ({**NO_EVAL, "spec.checkpoint.keepBest": 2}, "spec.checkpoint.keepBest", "no evaluation data", "remove it"),
    (
        {"spec.evaluation.earlyStopping": {}, "spec.checkpoint.keepBest": 0},
        "spec.checkpoint.keepBest",
        "exports the best checkpoint",
        "set it to 1",
    ),
    (
        {**NO_EVAL, "spec.evaluation.earlyStopping": {}},
        "spec.evaluation.earlyStopping",
        "no evaluation data",
        "evalFraction",
    ),
    (
        {"spec.export": {"format": "none", "pushToHub": {"repoId": "a/b"}}},
        "spec.export.pushToHub",
        "no export",
        "safetensors",
    ),
    ({"spec.evaluation.metric": "f1"}, "spec.evaluation.metric", "for task sequence-cl", "use loss or perplexity"),
    (
        {**PAIR, "spec.evaluation.metric": "perplexity"},
        "spec.evaluation.metric",
        "is for task causal-lm",
        "use loss or accuracy or f1",
    ),
    ({"spec.evaluation.mode": "max"}, "spec.evaluation.mode", "worst checkpoint by loss", "write min"),
    # optimisation
    (
        {"spec.training.epochs": None, "spec.training.maxSteps": 10, "spec.training.schedule.warmupSteps": 11},
        "spec.training.schedule.warmupSteps",
        "more than maxSteps 10",
        "10 or less",
    ),
    (
        {"spec.training.schedule": {"type": "constant", "minLrRatio": 0.1}},
        "spec.training.schedule.minLrRatio",
        "no effect on a constant schedule",
        "cosine or linear",
    ),
    ({"spec.training.optimizer.betas": [0.9, 1.0]}, "spec.training.optimizer.betas[1]", "less than 1", "such as 0.9"),
    (
        {"spec.training.precision": "fp16", "spec.execution.device": "cpu"},
        "spec.training.precision",
        "for GPUs only",
        "bf16 or fp32",
    ),
    (
        {"spec.export.mergeLora": False},
        "spec.export.mergeLora",
        "no adapters to merge",
        "add spec.training.lora",
    ),
    (
        {"spec.training.lora": {}, "spec.export": {"mergeLora": False, "format": "none"}},
        "spec.export.mergeLora",
        "nothing is exported",
        "remove spec.export.format",
    ),
    # hardware
    (
        {"spec.nodePools[0].nodes": 3},
        "spec.training.globalBatchSize",
        "by 24 ranks x microBatchSize 1",
        "1, 2, 4, 8 nod",
    ),
    ({"spec.execution.microBatchSize": 3}, "spec.training.globalBatchSize", "microBatchSize 3", "1, 2 or 4"),
    (
        {"spec.nodePools[0].gpusPerNode": 0, "spec.execution.device": "cuda"},
        "spec.execution.device",
        "no pool has GPUs",
        "gpusPerNode",
    ),
    # storage
    (
        {"spec.storage": {"uri": "file:///runs", "endpointUrl": "https://minio"}},
        "spec.storage.endpointUrl",
        "is for S3",
        "s3:// URI",
    ),
    # secrets
    ({"spec.env": [{"name": "HF_TOKEN", "value": "x"}]}, "spec.env[0].value", "HF_TOKEN looks like", "secretKeyRef"),
    ({"spec.env": [{"name": "DB_PASSWORD", "value": "x"}]}, "spec.env[0].value", "DB_PASSWORD looks", "secretKeyRef"),
    ({"spec.env": [{"name": "WANDB_API_KEY", "value": "x"}]}, "spec.env[0].value", "WANDB_API_KEY", "secretKeyRef"),
    (
        {"spec.env": [{"name": "NOTE", "value": "AKIA" + "A1" * 8}]},
        "spec.env[0].value",
        "looks like an AWS access key",
        "revoke it",
    ),
    (
        {"metadata.annotations": {"note": "hf_" + "a1B2" * 8}},
        "metadata.annotations.note",
        "looks like a Hugging Face token",
        "revoke it",
    ),
    (
        {"spec.env": [{"name": "https_proxy", "value": "http://me:pw@proxy:3128"}]},
        "spec.env[0].value",
        "credentials in a URL",
        "Secret",
    ),
    (
        {"spec.deepspeed.config": {"comms_logger": {"x": ["ghp_" + "a" * 36]}}},
        "spec.deepspeed.config.comms_logger.x[0]",
        "looks like a GitHub token",
        "revoke it",
    ),
    # queues
    (
        {"spec.queue": {"name": "root.a", "scheduler": "yunikorn", "priorityClass": "high"}},
        "spec.queue.priorityClass",
        "no effect with scheduler yunikorn",
        "spec.nodePools[].priorityClassName",
    ),
    (
        {"spec.queue": {"name": "a", "scheduler": "kai"}, "spec.deadlines": {"queueSeconds": 60}},
        "spec.deadlines.queueSeconds",
        "no effect with scheduler kai",
        "spec.deadlines.provisionSeconds",
    ),
    # DeepSpeed
    ({"spec.deepspeed.config": {"bf16": {}}}, "spec.deepspeed.config.bf16", "decided by", "spec.training.precision"),
    (
        {"spec.deepspeed.config": {"zero_optimization": {"stage": 2}}},
        "spec.deepspeed.config.zero_optimization.stage",
        "is decided by the manifest",
        "spec.deepspeed.stage",
    ),
    (
        {"spec.deepspeed.config": {"data_types": {"param_dtype": "fp32"}}},
        "spec.deepspeed.config.data_types.param_dtype",
        "is decided by the manifest",
        "spec.training.precision",
    ),
    ({"spec.deepspeed.config": {"elasticity": {}}}, "spec.deepspeed.config.elasticity", "was removed", "remove it"),
    (
        {"spec.deepspeed.config": {"zero_optimization": {"zero_quantized_weights": True}}},
        "spec.deepspeed.config.zero_optimization.zero_quantized_weights",
        "would start a compiler",
        "remove it",
    ),
    (
        {"spec.deepspeed.config": {"zero_optimization": {"overlap_com": True}}},
        "spec.deepspeed.config.zero_optimization.overlap_com",
        "did you mean overlap_comm?",
        "rename it",
    ),
    (
        {"spec.deepspeed.config": {"zero_optimization": {"reduce_bucket_size": "auto"}}},
        "spec.deepspeed.config.zero_optimization.reduce_bucket_size",
        "Hugging Face Trainer",
        "give a value",
    ),
    (
        {"spec.deepspeed.config": {"reduce_bucket_size": 10}},
        "spec.deepspeed.config.reduce_bucket_size",
        "at this level",
        "move it into zero_optimization",
    ),
    ({"spec.deepspeed.config": {"qqq": 1}}, "spec.deepspeed.config.qqq", "unknown DeepSpeed key", "remove it"),
    (
        {"spec.deepspeed.config": {"zero_optimization": True}},
        "spec.deepspeed.config.zero_optimization",
        "must be a mapping",
        "KEY: VALUE",
    ),
]


@pytest.mark.parametrize(
    ("edits", "field", "message", "remedy"), CONTRADICTIONS, ids=[f"{row[1]}-{row[2]}" for row in CONTRADICTIONS]
)
def test_each_contradiction_is_one_problem_with_a_way_out(manifest, edits, field, message, remedy):
    (problem,) = problems_of(manifest(edits))
    assert problem.field == field
    assert message in problem.message
    assert remedy in problem.remedy
    assert problem.reason is Reason.INVALID


RIGHT = [
    {},
    {"spec.data.packing": True, "spec.execution.lossKernel": "chunked"},
    mixture(weight=0.5, format="messages"),
    {**mixture(), "spec.data.eval": {"uri": "hf://org/c", "format": "prompt_completion"}},
    {"spec.training.lora": {}},
    {
        "spec.training.lora": {"targetModules": "q_proj, layers.0.v_proj", "useDora": True},
        "spec.export.mergeLora": False,
    },
    {**PAIR, "spec.evaluation.metric": "f1", "spec.data.train.columns": {"textPair": "b", "label": "y"}},
    {
        "spec.data.lossOn": "all",
        "spec.data.chatTemplate.fromModel": "org/model",
        "spec.evaluation.metric": "perplexity",
    },
    {**NO_EVAL, "spec.data.evalFraction": 0.1, "spec.checkpoint.keepBest": 2, "spec.evaluation.mode": "min"},
    {**NO_EVAL, "spec.checkpoint.keepBest": 0},
    {"spec.data.eval": {"uri": "s3://bucket/saved", "split": "test"}},
    {"spec.storage": {"endpointUrl": "https://minio:9000", "region": "us-east-1"}},
    {
        "spec.storage": {"uri": "file:///runs", "region": "x"},
        "spec.data.train": {"uri": "s3://abc/d", "format": "messages"},
    },
    {"spec.nodePools": []},
    {"spec.nodePools[0].gpusPerNode": 0, "spec.execution.device": "cpu"},
    {"spec.training.schedule": {"type": "constant", "warmupSteps": 10}},
    {
        "spec.env": [
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
            {"name": "TOKENIZERS_PARALLELISM", "value": "false"},
            {"name": "HF_ENDPOINT", "value": "https://mirror/path@2x"},
            {"name": "EMPTY_TOKEN", "value": ""},
        ]
    },
    {
        "spec.deepspeed.config": {
            "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5e8, "zero_hpz_partition_size": 8},
            "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": "auto"},
            "steps_per_print": 10,
        }
    },
    {"metadata.annotations": {"kubectl.kubernetes.io/last-applied-configuration": "hf_" + "a" * 30}},
]


@pytest.mark.parametrize("edits", RIGHT, ids=str)
def test_what_fits_has_no_problem(manifest, edits):
    assert check(parse(manifest(edits))) == ()


def test_a_secret_is_told_apart_by_its_place_and_never_shown(manifest):
    (problem,) = problems_of(manifest({"spec.env": [{"name": "HF_TOKEN", "value": "hf_" + "a1B2" * 8}]}))
    assert (problem.field, problem.value) == ("spec.env[0].value", REDACTED)


PROGRAM = {"spec.model": None, "spec.data": None, "spec.training": None, "spec.program": {"entrypoint": "mine:train"}}


def test_a_program_stands_alone(manifest):
    assert check(parse(manifest(PROGRAM))) == ()


def test_settings_of_the_built_in_training_have_no_effect_on_a_program(manifest):
    edits = {
        **PROGRAM,
        "spec.checkpoint": {"everySteps": 5, "onWorldSizeChange": "refuse"},
        "spec.execution": {"device": "cpu", "microBatchSize": 4},
        "spec.startFrom": {"run": "old"},
    }
    found = problems_of(manifest(edits))
    assert {problem.field for problem in found} == {
        "spec.checkpoint.everySteps",
        "spec.checkpoint.onWorldSizeChange",
        "spec.execution.microBatchSize",
        "spec.startFrom",
    }
    assert {problem.message for problem in found} == {"has no effect with spec.program"}


@pytest.mark.parametrize("end", ["", "\n", " \r\n"])
def test_a_secret_is_cut_out_of_what_is_told_with_or_without_its_lines_end(end: str) -> None:
    """`echo secret | base64` brings one; clients strip it, or print it as it is written in Python."""
    secret = f"very-secret-{end}"
    told = without_secrets(f"header {secret!r}, {secret} and {secret.strip()}", {"MLFLOW_TRACKING_TOKEN": secret})
    assert "very-secret" not in told
    assert told.count(REDACTED) == 3
