"""What a schema cannot say: fields that are each right and do not fit together.

Pure, so that the CLI says it before anything starts and the operator before anything is created. Each check is one
rule over the spec, and says nothing about parts that are missing.
"""

from collections.abc import Callable, Iterator
from itertools import islice

from pydantic.alias_generators import to_camel

from dsft_api.batch import BatchError, plan_batch
from dsft_api.deepspeed_config import check_config
from dsft_api.formats import FORMATS
from dsft_api.not_supported import check_built, written
from dsft_api.plain_secrets import check_secrets, redacted
from dsft_api.problem import Problem, field_name
from dsft_api.resource import DeepSpeedFineTune
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.identity import Columns, DataFormat, DatasetSource, DataSpec, EvalSource, Task
from dsft_api.uris import check_uris, uris

_METRIC_TASK: dict[str, Task] = {
    "perplexity": "causal-lm",
    "accuracy": "sequence-classification",
    "f1": "sequence-classification",
}

# Wrong DeepSpeed keys that are told at once: to each the nearest right one is looked for, which takes time from other runs.
MAX_KEYS = 50

# Settings of the built-in training.
_BUILT_IN_ONLY = (
    "startFrom",
    "evaluation.everySteps",
    "evaluation.earlyStopping",
    "evaluation.samples",
    "execution.microBatchSize",
    "execution.evalBatchSize",
    "execution.activationCheckpointing",
    "execution.attention",
    "execution.lossKernel",
    "execution.interconnect.minAllGatherGBps",
    "deepspeed.config",
    "checkpoint.everySteps",
    "checkpoint.everyMinutes",
    "checkpoint.interval",
    "checkpoint.maxFailures",
    "checkpoint.onWorldSizeChange",
    "checkpoint.keepBest",
    "export.format",
    "export.pushToHub",
    "export.mergeLora",
    "tracking.tensorboard",
    "tracking.mlflow",
    "tracking.wandb",
)


def check(resource: DeepSpeedFineTune) -> tuple[Problem, ...]:
    """Every problem of a resource that fits the schema; none means that it can be run.

    Reason NotSupported marks what is right and not built yet, Invalid all else.
    """
    found = [problem for rule in RULES for problem in rule(resource.spec)]
    return tuple(redacted(problem) for problem in (*found, *check_secrets(resource)))


def deepspeed_keys_are_free(spec: FineTuneSpec) -> Iterator[Problem]:
    """`deepspeed.config` sets nothing that the manifest, this trainer or DeepSpeed 0.19 does not leave to it."""
    yield from islice(check_config(spec.deepspeed.config), MAX_KEYS)


def format_fits_task(spec: FineTuneSpec) -> Iterator[Problem]:
    """A format gives the columns that a task needs."""
    if spec.model is None or spec.data is None:
        return
    fitting = tuple(name for name, form in FORMATS.items() if form.task == spec.model.task)
    for field, used in _formats(spec.data):
        if used not in fitting:
            yield Problem(
                field,
                f"does not fit task {spec.model.task}",
                f"use {_either(fitting)}, or change spec.model.task",
                used,
            )


def columns_fit_format(spec: FineTuneSpec) -> Iterator[Problem]:
    """A column of another format is never read."""
    if spec.data is None:
        return
    sources: list[tuple[str, DataFormat | None, Columns | None]] = []
    for field, source in spec.data.sources():
        sources.append((field, source.format, source.columns))
    if held_out := spec.data.eval:
        inherited = spec.data.train.format if spec.data.train else None
        sources.append(("spec.data.eval", held_out.format or inherited, held_out.columns))
    for field, used, columns in sources:
        if used is None or columns is None:
            continue
        read = [to_camel(name) for name, _ in FORMATS[used].columns]
        for name, column in columns.to_wire().items():
            if name not in read:
                remedy = f"remove it; format {used} reads {', '.join(read)}"
                yield Problem(f"{field}.columns.{name}", f"is not read by format {used}", remedy, column)


def loss_on_fits_format(spec: FineTuneSpec) -> Iterator[Problem]:
    """`lossOn` names a part that the rows have."""
    if spec.data is None or spec.data.loss_on is None:
        return
    for _, used in _formats(spec.data):
        allowed = FORMATS[used].loss_on
        if spec.data.loss_on not in allowed:
            remedy = f"use {_either(allowed)}" if allowed else "remove it: classification trains on the label"
            yield Problem("spec.data.lossOn", f"does not fit format {used}", remedy, spec.data.loss_on)
            return


def packing_needs_causal_lm(spec: FineTuneSpec) -> Iterator[Problem]:
    """A classifier has one label per sequence."""
    if spec.model is not None and spec.data is not None and spec.data.packing and spec.model.task != "causal-lm":
        yield Problem("spec.data.packing", f"does not fit task {spec.model.task}", "remove it", True)


def streaming_fits(spec: FineTuneSpec) -> Iterator[Problem]:
    """What needs all rows at once does not go together with data that is never there at once."""
    data = spec.data
    if data is None or not data.streaming:
        return
    others = {
        "mixture": data.mixture is not None,
        "evalFraction": data.eval_fraction is not None,
        "groupByLength": data.group_by_length,
        "loader": data.loader == "ray-data",
    }
    for name, is_set in others.items():
        if is_set:
            yield Problem(
                f"spec.data.{name}", "does not go together with spec.data.streaming", f"remove {name}, or streaming"
            )
    if data.train is not None and not data.train.uri.startswith(("s3://", "file://")):
        remedy = "put its JSON lines, CSV or Parquet files there, or remove spec.data.streaming"
        yield Problem("spec.data.train.uri", "cannot be streamed: only s3:// and file:// can", remedy, data.train.uri)


def chunked_loss_needs_causal_lm(spec: FineTuneSpec) -> Iterator[Problem]:
    """A classifier has one small row of logits per sequence."""
    if spec.model is not None and spec.execution.loss_kernel == "chunked" and spec.model.task != "causal-lm":
        field = "spec.execution.lossKernel"
        yield Problem(field, f"does not fit task {spec.model.task}", "write standard", "chunked")


def chat_template_needs_messages(spec: FineTuneSpec) -> Iterator[Problem]:
    """Only messages are put through a chat template."""
    if spec.data is None or spec.data.chat_template is None:
        return
    if "messages" not in [used for _, used in _formats(spec.data)]:
        yield Problem(
            "spec.data.chatTemplate", "is used with format messages only", "remove it, or use format messages"
        )


def eval_differs_from_train(spec: FineTuneSpec) -> Iterator[Problem]:
    """Evaluation on the training data measures nothing."""
    if spec.data is None or spec.data.eval is None:
        return
    train, own = spec.data.train, spec.data.eval
    held_out = own if own.uri or train is None else train.model_copy(update=own.model_dump(exclude_none=True))
    if _place(held_out) in [_place(source) for _, source in spec.data.sources()]:
        yield Problem("spec.data.eval", "is the training data itself", "name another split or uri, or use evalFraction")


def eval_beside_a_mixture_is_whole(spec: FineTuneSpec) -> Iterator[Problem]:
    """There is no one data set that evaluation data could take its rest from."""
    if spec.data is None or spec.data.eval is None or spec.data.mixture is None:
        return
    for name in ("uri", "format"):
        if getattr(spec.data.eval, name) is None:
            yield Problem(f"spec.data.eval.{name}", "is missing: a mixture has no one to take it from", f"add {name}")


def evaluation_needs_data(spec: FineTuneSpec) -> Iterator[Problem]:
    """Settings of an evaluation that will not take place."""
    if spec.data is None or spec.data.eval is not None or spec.data.eval_fraction is not None:
        return
    remedy = "add spec.data.eval or spec.data.evalFraction, or remove it"
    if asked := spec.evaluation.asked:
        alias = type(spec.evaluation).model_fields[min(asked)].alias
        yield Problem(f"spec.evaluation.{alias}", "there is no evaluation data", remedy)
    if "keep_best" in spec.checkpoint.asked and spec.checkpoint.keep_best > 0:
        yield Problem("spec.checkpoint.keepBest", "there is no evaluation data to find the best by", remedy)


def early_stopping_keeps_the_best(spec: FineTuneSpec) -> Iterator[Problem]:
    """What is exported after early stopping is the best checkpoint, so there must be one."""
    if spec.evaluation.early_stopping is not None and spec.checkpoint.keep_best == 0:
        yield Problem(
            "spec.checkpoint.keepBest",
            "is 0, and spec.evaluation.earlyStopping exports the best checkpoint",
            "set it to 1, or remove earlyStopping",
            0,
        )


def samples_need_causal_lm(spec: FineTuneSpec) -> Iterator[Problem]:
    """A classifier writes nothing."""
    if spec.model is not None and spec.evaluation.samples is not None and spec.model.task != "causal-lm":
        yield Problem("spec.evaluation.samples", f"does not fit task {spec.model.task}", "remove it")


def push_needs_an_export(spec: FineTuneSpec) -> Iterator[Problem]:
    """Nothing is uploaded where nothing is exported."""
    if spec.export.push_to_hub is not None and spec.export.format == "none":
        remedy = "remove it, or write spec.export.format: safetensors"
        yield Problem("spec.export.pushToHub", "there is no export with spec.export.format none", remedy)


def metric_fits_task(spec: FineTuneSpec) -> Iterator[Problem]:
    """Each metric has one task, and one direction that is better."""
    evaluation = spec.evaluation
    task = _METRIC_TASK.get(evaluation.metric)
    if spec.model is not None and task not in (None, spec.model.task):
        metrics = ("loss", *(metric for metric, its in _METRIC_TASK.items() if its == spec.model.task))
        yield Problem("spec.evaluation.metric", f"is for task {task}", f"use {_either(metrics)}", evaluation.metric)
    better = "max" if evaluation.metric in ("accuracy", "f1") else "min"
    if evaluation.mode not in (None, better):
        yield Problem(
            "spec.evaluation.mode",
            f"would keep the worst checkpoint by {evaluation.metric}",
            f"remove it, or write {better}",
            evaluation.mode,
        )


def optimisation_fits(spec: FineTuneSpec) -> Iterator[Problem]:
    """Numbers of the optimisation that contradict each other."""
    if spec.training is None:
        return
    training, schedule = spec.training, spec.training.schedule
    if training.max_steps is not None and schedule.warmup_steps > training.max_steps:
        yield Problem(
            "spec.training.schedule.warmupSteps",
            f"is more than maxSteps {training.max_steps}",
            f"set it to {training.max_steps} or less",
            schedule.warmup_steps,
        )
    if schedule.type == "constant" and schedule.min_lr_ratio > 0:
        yield Problem(
            "spec.training.schedule.minLrRatio",
            "has no effect on a constant schedule",
            "remove it, or use type cosine or linear",
            schedule.min_lr_ratio,
        )
    for index, beta in enumerate(training.optimizer.betas):
        if not 0 <= beta < 1:
            field = f"spec.training.optimizer.betas[{index}]"
            yield Problem(field, "must be at least 0 and less than 1", "write a decay such as 0.9", beta)
    if training.precision == "fp16" and spec.execution.device == "cpu":
        yield Problem("spec.training.precision", "is for GPUs only", "use bf16 or fp32 on device cpu", "fp16")


def flash_attention_fits(spec: FineTuneSpec) -> Iterator[Problem]:
    """Its kernels are for GPUs, and know two precisions."""
    if spec.training is None or spec.execution.attention != "flash_attention_2":
        return
    field = "spec.execution.attention"
    if spec.execution.device == "cpu":
        yield Problem(field, "is for GPUs only", "use sdpa or eager on device cpu", spec.execution.attention)
    if spec.training.precision == "fp32":
        yield Problem(field, "needs bf16 or fp16", "use sdpa or eager with fp32", spec.execution.attention)


def merge_needs_adapters(spec: FineTuneSpec) -> Iterator[Problem]:
    """Only adapters can be exported unmerged."""
    if spec.export.merge_lora or spec.training is None:
        return
    if spec.training.lora is None:
        yield Problem(
            "spec.export.mergeLora", "there are no adapters to merge", "remove it, or add spec.training.lora", False
        )
    elif spec.export.format == "none":
        yield Problem("spec.export.mergeLora", "nothing is exported", "remove it, or remove spec.export.format", False)


def batch_fits_pools(spec: FineTuneSpec) -> Iterator[Problem]:
    """The ranks of the pools divide the global batch."""
    if spec.training is None or not spec.node_pools:
        return
    if spec.execution.device == "cuda" and spec.gpus == 0:
        yield Problem("spec.execution.device", "no pool has GPUs", "set gpusPerNode, or use device cpu", "cuda")
    per_node = {pool.gpus_per_node or 1 for pool in spec.node_pools}
    together = per_node.pop() if len(per_node) == 1 and spec.trains_on_gpus else 1
    try:
        plan_batch(spec.training.global_batch_size, spec.ranks, spec.execution.micro_batch_size, together)
    except BatchError as error:
        yield Problem("spec.training.globalBatchSize", error.message, error.remedy)


def program_has_its_own_settings(spec: FineTuneSpec) -> Iterator[Problem]:
    """What tells the built-in training how, a program never sees."""
    if spec.program is None:
        return
    for path in _BUILT_IN_ONLY:
        for place, _ in written(spec, path):
            yield Problem(
                field_name(("spec", *place)), "has no effect with spec.program", "remove it; use spec.program.config"
            )


def model_code_stays_with_the_ranks(spec: FineTuneSpec) -> Iterator[Problem]:
    """Ray Data's tasks get a tokenizer by value, and its class only from installed packages."""
    if spec.model is None or spec.data is None or not spec.model.trust_remote_code:
        return
    if spec.data.loader == "ray-data":
        message = "does not fit spec.model.trustRemoteCode: the tasks of Ray Data have no code of the model"
        yield Problem("spec.data.loader", message, "use loader torch", "ray-data")


def s3_settings_need_s3(spec: FineTuneSpec) -> Iterator[Problem]:
    """Settings of S3 without anything on S3. Absent storage is the operator's, which may be S3."""
    storage = spec.storage
    if storage.uri is None or any(uri.startswith("s3://") for _, uri in uris(spec)):
        return
    for name in ("endpoint_url", "region", "credentials", "ca_bundle"):
        if getattr(storage, name) is not None:
            alias = type(storage).model_fields[name].alias
            yield Problem(
                f"spec.storage.{alias}", "is for S3, and no URI here is s3://", "remove it, or use an s3:// URI"
            )


def queue_fits_scheduler(spec: FineTuneSpec) -> Iterator[Problem]:
    """Only Kueue holds a run back before it has pods, and YuniKorn takes a priority from pods only."""
    if spec.queue is None or spec.queue.scheduler == "kueue":
        return
    scheduler = spec.queue.scheduler
    if scheduler == "yunikorn" and spec.queue.priority_class is not None:
        yield Problem(
            "spec.queue.priorityClass",
            "has no effect with scheduler yunikorn, which takes the priority from the pods",
            "remove it, and write spec.nodePools[].priorityClassName",
            spec.queue.priority_class,
        )
    if spec.deadlines.queue_seconds is not None:
        yield Problem(
            "spec.deadlines.queueSeconds",
            f"has no effect with scheduler {scheduler}: the pods are there, and wait for nodes",
            "write spec.deadlines.provisionSeconds instead",
            spec.deadlines.queue_seconds,
        )


def _place(source: DatasetSource | EvalSource) -> tuple[str | None, ...]:
    return source.uri, source.revision or "main", source.subset, source.split or "train"


def _formats(data: DataSpec) -> Iterator[tuple[str, DataFormat]]:
    for field, source in data.sources():
        yield f"{field}.format", source.format
    if data.eval is not None and data.eval.format is not None:
        yield "spec.data.eval.format", data.eval.format


def _either(words: tuple[str, ...]) -> str:
    return " or ".join(words)


RULES: tuple[Callable[[FineTuneSpec], Iterator[Problem]], ...] = (
    check_uris,
    format_fits_task,
    columns_fit_format,
    loss_on_fits_format,
    packing_needs_causal_lm,
    streaming_fits,
    chunked_loss_needs_causal_lm,
    chat_template_needs_messages,
    eval_differs_from_train,
    eval_beside_a_mixture_is_whole,
    evaluation_needs_data,
    early_stopping_keeps_the_best,
    samples_need_causal_lm,
    push_needs_an_export,
    metric_fits_task,
    optimisation_fits,
    flash_attention_fits,
    merge_needs_adapters,
    batch_fits_pools,
    program_has_its_own_settings,
    model_code_stays_with_the_ranks,
    s3_settings_need_s3,
    queue_fits_scheduler,
    deepspeed_keys_are_free,
    check_built,
)
