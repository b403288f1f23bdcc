"""The plan of a run: batches, steps, tokens, memory, checkpoints; what will not fit, and which field to change.

A remedy is found by asking again with one field changed: what is named makes it fit, by the same estimate.
"""

from collections.abc import Iterator
from dataclasses import replace

from pydantic import Field

from dsft_api.base import ApiModel
from dsft_api.batch import BatchError, plan_batch
from dsft_api.estimate.memory import (
    DeviceMemory,
    HostMemory,
    checkpoint_bytes,
    device_memory,
    export_bytes,
    host_memory,
)
from dsft_api.estimate.sizes import DataSize, ModelSize, Place
from dsft_api.problem import Problem
from dsft_api.spec import FineTuneSpec


class ModelPlan(ApiModel):
    """The model."""

    parameters: int = Field(description="Weights.")
    trainable: int = Field(description="Of them trained.")
    length: int = Field(description="Tokens of the longest row, on which the estimate of activations rests.")


class BatchPlanned(ApiModel):
    """How the global batch is cut."""

    ranks: int = Field(description="Ranks.")
    nodes: int = Field(description="Nodes.")
    micro_batch_size: int = Field(description="Rows per rank at once.")
    gradient_accumulation_steps: int = Field(description="Micro-batches per rank and optimizer step.")
    valid_nodes: tuple[int, ...] = Field(description="Numbers of such nodes that divide globalBatchSize.")


class DataPlan(ApiModel):
    """The training data."""

    rows: int = Field(description="Rows to train on.")
    eval_rows: int = Field(description="Rows to evaluate on.")
    exact: bool = Field(description="Whether all rows were tokenised, or some, and the rest is taken to be like them.")
    tokens_per_row: float = Field(description="Mean.")
    tokens_per_epoch: int = Field(description="Without padding; an incomplete last batch is dropped.")
    steps_per_epoch: int = Field(description="Optimizer steps.")


class StepsPlan(ApiModel):
    """The length of the training."""

    steps: int = Field(description="Optimizer steps.")
    samples: int = Field(description="Rows, each as often as it is seen.")
    epochs: float | None = Field(default=None, description="Passes over the data.")
    tokens: int | None = Field(default=None, description="Without padding.")
    evaluations: int = Field(default=0, description="Evaluations.")


class CheckpointPlan(ApiModel):
    """One checkpoint, and all of them."""

    bytes: int = Field(description="Of one, over all ranks.")
    every_steps: int | None = Field(default=None, description="Steps from one to the next.")
    every_minutes: float | None = Field(default=None, description="Or minutes.")
    count: int | None = Field(default=None, description="How many are written, the last one included.")
    upload_minutes: float = Field(description="Of one, beside the training, at the assumed rate.")
    rate_per_node: float = Field(description="That rate: bytes per second of a node.")
    stored_bytes: int = Field(
        description="The most in storage at one time: those kept, one on its way, and the export."
    )


class Exceeded(ApiModel):
    """What will not fit."""

    field: str = Field(description="The field to change.")
    message: str = Field(description="What is wrong.")
    remedy: str = Field(description="What to write.")


class RunPlan(ApiModel):
    """What `dsft plan` shows."""

    batch: BatchPlanned | None = None
    model: ModelPlan | None = None
    data: DataPlan | None = None
    steps: StepsPlan | None = None
    gpu_memory: DeviceMemory | None = Field(default=None, description="Per rank; on CPU in its process.")
    gpu_bytes: int | None = Field(default=None, description="What a GPU has.")
    host_memory: HostMemory | None = Field(default=None, description="Of the first node.")
    host_bytes: int | None = Field(default=None, description="What a node may use.")
    checkpoint: CheckpointPlan | None = None
    missing: tuple[str, ...] = Field(default=(), description="What is not known, and why.")
    problems: tuple[Exceeded, ...] = Field(default=(), description="What will not fit.")


def plan_run(
    spec: FineTuneSpec,
    place: Place,
    model: ModelSize | None,
    data: DataSize | None,
    missing: tuple[str, ...] = (),
) -> RunPlan:
    """The plan, with the parts left out for which model or data are not known (`missing` says why)."""
    steps = _steps(spec, data)
    device = device_memory(model, spec, place, evaluates=_evaluates(spec)) if model else None
    host = host_memory(model, spec, place, device) if model and device else None
    return RunPlan(
        batch=_batch(spec, place),
        model=ModelPlan(parameters=model.parameters, trainable=model.trained_parameters, length=model.length)
        if model
        else None,
        data=_data(spec, data) if data else None,
        steps=steps,
        gpu_memory=device,
        gpu_bytes=place.gpu_bytes,
        host_memory=host,
        host_bytes=place.host_bytes,
        checkpoint=_checkpoint(spec, place, model, steps, data) if model else None,
        missing=missing,
        problems=tuple(
            Exceeded(field=problem.field, message=problem.message, remedy=problem.remedy)
            for problem in _problems(spec, place, model, data)
        ),
    )


def _evaluates(spec: FineTuneSpec) -> bool:
    data = spec.workload().data
    return data.eval is not None or data.eval_fraction is not None


def _batch(spec: FineTuneSpec, place: Place) -> BatchPlanned | None:
    size, micro = spec.workload().training.global_batch_size, spec.execution.micro_batch_size
    try:
        batch = plan_batch(size, place.ranks, micro)
    except BatchError:
        return None
    each = place.ranks_per_node
    counts = tuple(nodes for nodes in range(1, size // (micro * each) + 1) if size % (nodes * each * micro) == 0)
    return BatchPlanned(
        ranks=place.ranks,
        nodes=place.nodes,
        micro_batch_size=micro,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        valid_nodes=counts,
    )


def _data(spec: FineTuneSpec, data: DataSize) -> DataPlan:
    size = spec.workload().training.global_batch_size
    steps = data.rows // size
    return DataPlan(
        rows=data.rows,
        eval_rows=data.eval_rows,
        exact=data.exact,
        tokens_per_row=round(data.tokens / data.rows, 1),
        tokens_per_epoch=data.tokens * steps * size // data.rows,
        steps_per_epoch=steps,
    )


def _steps(spec: FineTuneSpec, data: DataSize | None) -> StepsPlan | None:
    training = spec.workload().training
    size = training.global_batch_size
    per_epoch = data.rows // size if data else 0
    if training.max_steps is None and not per_epoch:
        return None
    steps = training.max_steps or max(1, round((training.epochs or 0) * per_epoch))
    if not data or not per_epoch:
        return StepsPlan(steps=steps, samples=steps * size)
    every = spec.evaluation.every_steps or per_epoch
    return StepsPlan(
        steps=steps,
        samples=steps * size,
        epochs=round(steps / per_epoch, 4),
        tokens=data.tokens * steps * size // data.rows,
        # The end is always evaluated.
        evaluations=-(-steps // every) if _evaluates(spec) else 0,
    )


def _checkpoint(
    spec: FineTuneSpec, place: Place, model: ModelSize, steps: StepsPlan | None, data: DataSize | None
) -> CheckpointPlan:
    policy, training = spec.checkpoint, spec.workload().training
    size = checkpoint_bytes(model, place.ranks)
    by_time = policy.every_minutes is not None or policy.interval is not None
    per_epoch = data.rows // training.global_batch_size if data else None
    every = None if by_time else policy.every_steps or per_epoch
    kept = policy.keep_last + (policy.keep_best if _evaluates(spec) else 0)
    return CheckpointPlan(
        bytes=size,
        every_steps=every,
        every_minutes=policy.every_minutes,
        count=-(-steps.steps // every) if steps and every else None,
        upload_minutes=round(size / place.nodes / place.storage_bytes_per_second / 60, 3),
        rate_per_node=place.storage_bytes_per_second,
        stored_bytes=(kept + 1) * size + export_bytes(model, spec),
    )


def _problems(spec: FineTuneSpec, place: Place, model: ModelSize | None, data: DataSize | None) -> Iterator[Problem]:
    """What will not fit: batch, rows, positions, GPU, host."""
    training = spec.workload().training
    try:
        plan_batch(training.global_batch_size, place.ranks, spec.execution.micro_batch_size, place.ranks_per_node)
    except BatchError as error:
        yield Problem("spec.training.globalBatchSize", error.message, error.remedy)
        return
    if data and data.rows < training.global_batch_size:
        remedy = f"lower it to {data.rows} or less, or add rows"
        yield Problem("spec.training.globalBatchSize", f"is more than the {data.rows} rows of the data", remedy)
    if model is None:
        return
    if data and data.exact and model.max_positions and data.positions > model.max_positions:
        message = f"the longest row has {data.positions} tokens, and the model has {model.max_positions} positions"
        yield Problem("spec.data.maxLength", message, f"set it to {model.max_positions} or less")
    device = device_memory(model, spec, place, evaluates=_evaluates(spec))
    if place.gpu_bytes is not None and device.total > place.gpu_bytes:
        yield _too_much_for_a_gpu(spec, place, model, device)
    host = host_memory(model, spec, place, device)
    if place.host_bytes is not None and host.total > place.host_bytes:
        message = f"a node needs {gib(host.total)} and may use {gib(place.host_bytes)}"
        remedy = f"give the pods {gib(host.total)} or more, or spread the ranks over more nodes"
        yield Problem("spec.nodePools[].resources", message, remedy)


def _too_much_for_a_gpu(spec: FineTuneSpec, place: Place, model: ModelSize, device: DeviceMemory) -> Problem:
    available = place.gpu_bytes or 0
    message = f"a rank needs {gib(device.total)}, and a GPU has {gib(available)}"
    for field, value, changed, elsewhere in _changes(spec, place):
        if device_memory(model, changed, elsewhere, evaluates=_evaluates(spec)).total <= available:
            return Problem(field, message, f"set it to {value}")
    remedy = "no single field makes it fit: use larger GPUs, more nodes and activationCheckpointing together, or LoRA"
    return Problem("spec.nodePools", message, remedy)


def _changes(spec: FineTuneSpec, place: Place) -> Iterator[tuple[str, object, FineTuneSpec, Place]]:
    """Single fields that take memory away, the cheapest first: field, new value, and the run with it."""
    execution, size = spec.execution, spec.workload().training.global_batch_size

    def changed(**values: object) -> FineTuneSpec:
        return spec.model_copy(update={"execution": execution.model_copy(update=values)})

    if execution.eval_batch_size > 1:
        yield "spec.execution.evalBatchSize", 1, changed(eval_batch_size=1), place
    if execution.loss_kernel == "standard" and spec.workload().model.task == "causal-lm":
        yield "spec.execution.lossKernel", "chunked", changed(loss_kernel="chunked"), place
    for rows in range(execution.micro_batch_size - 1, 0, -1):
        if size % (place.ranks * rows) == 0:
            yield "spec.execution.microBatchSize", rows, changed(micro_batch_size=rows), place
    if not execution.activation_checkpointing:
        yield "spec.execution.activationCheckpointing", "true", changed(activation_checkpointing=True), place
    each = place.ranks_per_node
    for nodes in range(place.nodes + 1, size // (each * execution.micro_batch_size) + 1):
        if size % (nodes * each * execution.micro_batch_size) == 0:
            yield "spec.nodePools[].nodes", nodes, spec, replace(place, nodes=nodes, ranks=nodes * each)


def gib(count: float) -> str:
    """Bytes as Kubernetes writes memory: 12.3 GiB, or 45 MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
