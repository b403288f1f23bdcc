"""`dsft plan`: reads the model's config and the data where they are, asks the estimate, and shows it.

What cannot be read is named in the plan, and the rest is estimated without it.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Literal

from rich.markup import escape
from rich.table import Table

from dsft_api.base import QUANTITY_PATTERN
from dsft_api.batch import PAD_TO_MULTIPLE_OF
from dsft_api.estimate.devices import PRODUCT_LABEL, gpu_bytes
from dsft_api.estimate.memory import DeviceMemory, HostMemory
from dsft_api.estimate.plan import CheckpointPlan, RunPlan, gib, plan_run
from dsft_api.estimate.sizes import DataSize, ModelSize, Place
from dsft_api.job import Job, Ranks, RunRef
from dsft_api.problem import ManifestError, Problem
from dsft_api.quantity import quantity
from dsft_api.resource import DeepSpeedFineTune, local_uid, spec_hash
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.placement import NodePool
from dsft_cli.devices import Machine, ranks_here
from dsft_cli.output import out
from dsft_cli.view import size


def place_of(
    spec: FineTuneSpec,
    machine: Machine,
    *,
    workers: int | None,
    gpu_memory: str | None,
    storage_rate: str,
    source: str,
) -> Place:
    """The pools of the manifest; without any, or with `workers`, this machine.

    Raises:
        ManifestError: for an option that is no quantity.
    """
    rate, gpu = _bytes("--storage-rate", storage_rate, source), _bytes("--gpu-memory", gpu_memory, source)
    if spec.node_pools and workers is None:
        device: Literal["cuda", "cpu"] = "cuda" if spec.trains_on_gpus else "cpu"
        return Place(
            device=device,
            ranks=spec.ranks,
            nodes=sum(pool.nodes for pool in spec.node_pools),
            ranks_per_node=max(pool.gpus_per_node for pool in spec.node_pools) if device == "cuda" else 1,
            gpu_bytes=(gpu or gpu_bytes(spec.node_pools)) if device == "cuda" else None,
            host_bytes=min(filter(None, map(_memory, spec.node_pools)), default=None),
            storage_bytes_per_second=rate or 1,
        )
    ranks = ranks_here(spec, machine, workers)
    return Place(
        device=ranks.device,
        ranks=ranks.count,
        nodes=1,
        ranks_per_node=ranks.count,
        gpu_bytes=gpu if ranks.device == "cuda" else None,
        host_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        storage_bytes_per_second=rate or 1,
    )


def _memory(pool: NodePool) -> int | None:
    """What a pod of the pool may use."""
    asked = pool.resources.limits.get("memory", pool.resources.requests.get("memory"))
    return None if asked is None else int(quantity(asked))


def _bytes(option: str, text: str | None, source: str) -> int | None:
    if text is None:
        return None
    if not re.match(QUANTITY_PATTERN, text) or quantity(text) < 1:
        raise ManifestError(
            source, (Problem(option, "is no quantity of bytes", "write one such as 80Gi or 500M", text),)
        )
    return int(quantity(text))


def plan(resource: DeepSpeedFineTune, place: Place, source: str, *, most_rows: int) -> RunPlan:
    """The plan of a manifest's run.

    Raises:
        ManifestError: for a program, of which nothing is known.
    """
    spec = resource.spec
    if spec.program is not None:
        problem = Problem("spec.program", "what a program needs is not known before it runs", "plan built-in training")
        raise ManifestError(source, (problem,))
    missing: list[str] = []
    with tempfile.TemporaryDirectory(prefix="dsft-plan-") as cache:
        model, data = _read_sizes(_job(resource, place), Path(cache), missing, most_rows=most_rows)
    if model is not None and place.device == "cuda" and place.gpu_bytes is None:
        missing.append(
            f"whether it fits the GPUs: give --gpu-memory, or nodeSelector {PRODUCT_LABEL} in spec.nodePools"
        )
    if place.host_bytes is None:
        missing.append("whether it fits the nodes: give resources.requests.memory in spec.nodePools")
    return plan_run(spec, place, model, data, tuple(missing))


def _job(resource: DeepSpeedFineTune, place: Place) -> Job:
    meta = resource.metadata
    return Job(
        run=RunRef(namespace=meta.namespace, name=meta.name, uid=local_uid(resource)),
        attempt=1,
        spec=resource.spec,
        spec_hash=spec_hash(resource.spec),
        storage_prefix="",
        ranks=Ranks(count=place.ranks, device=place.device, threads=1),
    )


def _read_sizes(
    job: Job, cache: Path, missing: list[str], *, most_rows: int
) -> tuple[ModelSize | None, DataSize | None]:
    """The sizes of model and data, as far as they can be read; what cannot is told to `missing`."""
    try:
        from dsft_trainer import sizing
        from dsft_trainer.errors import TrainerError
    except ImportError as error:
        missing.append(f"model and data: {error.name} is not installed; pip install 'dsft[trainer]'")
        return None, None
    work, execution = job.spec.workload(), job.spec.execution
    data: DataSize | None = None
    try:
        folder = sizing.fetch_config(job, cache)
    except TrainerError as error:
        missing.append(f"model and data: {error.message}; {error.remedy}")
        return None, None
    try:
        if work.data.streaming:
            missing.append("data: it is streamed, so its rows and tokens are not counted here")
        else:
            data = sizing.data_size(job, folder, cache, most_rows=most_rows)
    except TrainerError as error:
        missing.append(f"data: {error.message}; {error.remedy}")
    multiple = PAD_TO_MULTIPLE_OF[job.ranks.device]
    longest = -(-data.longest // multiple) * multiple if data else work.data.max_length
    try:
        model = sizing.model_size(
            work.model,
            folder,
            precision=work.training.precision,
            # Its kernels are not here; what it keeps for the backward pass is what sdpa keeps.
            attention="sdpa" if execution.attention == "flash_attention_2" else execution.attention,
            length=min(longest, work.data.max_length),
            lora=work.training.lora,
        )
    except TrainerError as error:
        missing.append(f"model: {error.message}; {error.remedy}")
        return None, data
    return model, data


def show(planned: RunPlan, name: str, device: str) -> None:
    """Print a plan for people."""
    table = Table("", "", box=None, show_header=False)
    for label, text in _lines(planned, device):
        table.add_row(label, text)
    out.print(f"[bold]{escape(name)}[/]")
    out.print(table)
    for text in planned.missing:
        out.print(f"[yellow]not known[/]: {escape(text)}", highlight=False)
    for problem in planned.problems:
        out.print(
            f"[red]will not fit[/]: {escape(problem.field)}: {escape(problem.message)} -> {escape(problem.remedy)}",
            highlight=False,
        )


def _lines(planned: RunPlan, device: str) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    if batch := planned.batch:
        cut = f"{batch.ranks} ranks x {batch.micro_batch_size} rows x {batch.gradient_accumulation_steps} accumulation steps"
        lines.append(("batch", f"{cut}; nodes that divide it: {', '.join(map(str, batch.valid_nodes))}"))
    if model := planned.model:
        lines.append(("parameters", f"{model.parameters:,}, trained {model.trainable:,}"))
    if data := planned.data:
        about = "" if data.exact else "about "
        rows = f"{data.rows:,} rows, {data.eval_rows:,} to evaluate on; {about}{data.tokens_per_row:,} tokens per row"
        lines.append(("data", f"{rows}, {about}{data.tokens_per_epoch:,} per epoch"))
    if steps := planned.steps:
        epochs = f", {steps.epochs:g} epochs" if steps.epochs is not None else ""
        tokens = f", {steps.tokens:,} tokens" if steps.tokens is not None else ""
        lines.append(
            ("steps", f"{steps.steps:,}, {steps.samples:,} samples{epochs}{tokens}, {steps.evaluations} evaluations")
        )
    if memory := planned.gpu_memory:
        of = f" of {gib(planned.gpu_bytes)}" if planned.gpu_bytes else ""
        lines.append(("GPU, each" if device == "cuda" else "rank, each", f"{gib(memory.total)}{of}: {_parts(memory)}"))
    if host := planned.host_memory:
        of = f" of {gib(planned.host_bytes)}" if planned.host_bytes else ""
        lines.append(("host, each", f"{gib(host.total)}{of}: {_parts(host)}"))
    if checkpoint := planned.checkpoint:
        lines.append(("checkpoint", _checkpoint_line(checkpoint)))
    return lines


def _parts(memory: DeviceMemory | HostMemory) -> str:
    """The parts that matter, by the names of the API."""
    parts = memory.model_dump(exclude={"total"})
    return ", ".join(f"{name.replace('_', ' ')} {gib(count)}" for name, count in parts.items() if count >= 2**20)


def _checkpoint_line(checkpoint: CheckpointPlan) -> str:
    cadence = "as often as pays" if checkpoint.every_minutes is None else f"every {checkpoint.every_minutes:g} min"
    if checkpoint.every_steps is not None:
        times = f", {checkpoint.count} times" if checkpoint.count is not None else ""
        cadence = f"every {checkpoint.every_steps:,} steps{times}"
    rate = f"{checkpoint.upload_minutes:.2g} min to upload at {size(int(checkpoint.rate_per_node))}/s per node"
    return f"{size(checkpoint.bytes)} {cadence}; {rate}; {size(checkpoint.stored_bytes)} in storage at most"
