"""Bytes of one rank and of one node under DeepSpeed ZeRO-3, with torch's AdamW in fp32 over the partitions.

What stays for the whole run is counted by kind. On top comes the larger of what three moments need: the turn from forward to
backward, the reduction of the gradients, and the optimizer step; or an evaluation. How each was found is said beside it
(DeepSpeed 0.19, runtime/zero/stage3.py).
"""

from pydantic import Field

from dsft_api.base import ApiModel
from dsft_api.batch import chunk_tokens
from dsft_api.estimate.sizes import BYTES, ModelSize, Place, ZeroSettings, share
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.placement import ExecutionSpec

# A rank but for what grows with the model: Python, torch, transformers, DeepSpeed. Measured on CPU; with CUDA it is assumed.
PROCESS_BYTES = {"cpu": 1_100_000_000, "cuda": 4_000_000_000}
# Of a GPU: the CUDA context, NCCL's buffers, and what the allocator cannot use. Assumed.
GPU_RESERVE = 2_000_000_000


class DeviceMemory(ApiModel):
    """Bytes of one rank: on its GPU, or on CPU in its process."""

    parameters: int = Field(description="This rank's share of the weights.")
    optimizer_state: int = Field(description="Its share of the fp32 weights and Adam's two moments.")
    gradients: int = Field(description="Its share of the gradients.")
    buckets: int = Field(description="DeepSpeed's buffer in which gradients are collected (reduce_bucket_size).")
    live_parameters: int = Field(description="Whole weights, gathered for the layers at work.")
    activations: int = Field(description="What the backward pass needs of the forward pass.")
    recomputed: int = Field(description="With activationCheckpointing: those of one layer, when the logits are gone.")
    logits: int = Field(description="Logits, and what the loss makes of them.")
    step: int = Field(description="Gradients in fp32 while the optimizer steps.")
    evaluation: int = Field(description="Logits of an evaluation batch.")
    reserve: int = Field(
        description="Of a GPU: context, NCCL, fragmentation (assumed). On CPU the process before it has a model."
    )
    total: int = Field(description="The most at one time: not all of these are there together.")


class HostMemory(ApiModel):
    """Bytes of one node's memory, beside what is in `DeviceMemory` on GPUs."""

    processes: int = Field(description="Ranks before they have a model.")
    device: int = Field(description="On CPU: what a GPU would hold.")
    staging: int = Field(description="The copy of the checkpoint that is being saved.")
    export: int = Field(description="What is exported at the end, on the first node.")
    total: int = Field(description="The most at one time.")


def checkpoint_bytes(model: ModelSize, ranks: int) -> int:
    """Of all ranks: fp32 weights and two moments of what is trained. What is frozen is not in it."""
    return ranks * 12 * share(model.trainable, ranks)


def export_bytes(model: ModelSize, spec: FineTuneSpec) -> int:
    """Of the exported model, or of the adapter."""
    if spec.export.format == "none":
        return 0
    training = spec.workload().training
    alone = training.lora is not None and not spec.export.merge_lora
    return BYTES[training.precision] * (model.trained_parameters if alone else model.parameters)


def device_memory(model: ModelSize, spec: FineTuneSpec, place: Place, *, evaluates: bool) -> DeviceMemory:
    """What one rank needs."""
    work, execution, zero = spec.workload(), spec.execution, ZeroSettings.of(spec)
    width = BYTES[work.training.precision]
    gradient_width = BYTES.get(zero.grad_accum_dtype or work.training.precision, width)
    trained, partition = share(model.trainable, place.ranks), share(model.frozen, place.ranks)
    partition += trained
    persistent = width * model.smaller_than(zero.stage3_param_persistence_threshold)
    parameters, optimizer_state, gradients = width * partition, 12 * trained, gradient_width * trained
    reduced = min(model.trained_parameters, zero.reduce_bucket_size)
    # On CPU what is never written to takes no memory.
    buckets = width * (reduced if place.device == "cpu" else zero.reduce_bucket_size)
    live = _live_parameters(model, zero, width)
    activations, recomputed = _activations(model, spec)
    # Cross entropy in fp32: its log-softmax and two gradients of that size, the second of which goes back into the model.
    narrow = width if width < 4 else 0
    logits = (12 + narrow) * _logits(model, execution, execution.micro_batch_size)
    step = _step_width(gradient_width) * min(trained, zero.sub_group_size)
    # Without gradients: the logits, their log-softmax, and a copy in fp32; measured as much where they are fp32 already.
    evaluation = (width + 8) * _logits(model, execution, execution.eval_batch_size) if evaluates else 0
    # A full bucket is copied, rank by rank, before it is reduced.
    left = activations * (1 - reduced / max(model.trained_parameters, 1))
    passes = live + activations + max(logits, recomputed)
    moments = (passes, live + width * reduced + left, persistent + step, live + evaluation)
    reserve = GPU_RESERVE if place.device == "cuda" else PROCESS_BYTES["cpu"]
    return DeviceMemory(
        parameters=parameters,
        optimizer_state=optimizer_state,
        gradients=gradients,
        buckets=buckets,
        live_parameters=live,
        activations=activations,
        recomputed=recomputed,
        logits=logits,
        step=step,
        evaluation=evaluation,
        reserve=reserve,
        total=parameters + optimizer_state + gradients + buckets + int(max(moments)) + reserve,
    )


def _logits(model: ModelSize, execution: ExecutionSpec, rows: int) -> int:
    """How many there are at one time."""
    whole, vocabulary = rows * model.logits_per_row, model.logits_per_row // model.length
    return min(whole, chunk_tokens(vocabulary) * vocabulary) if execution.loss_kernel == "chunked" else whole


def _live_parameters(model: ModelSize, zero: ZeroSettings, width: int) -> int:
    """Weights stay whole that are needed again within the reuse distance, which goes forth and back; and small ones."""
    kept = zero.stage3_max_reuse_distance // 2 + model.smaller_than(zero.stage3_param_persistence_threshold)
    return width * min(model.parameters, kept + zero.stage3_prefetch_bucket_size + model.largest_module)


def _step_width(gradient_width: int) -> int:
    """Gradients are laid side by side and turned into fp32, a sub-group at a time."""
    return gradient_width + 4 if gradient_width < 4 else 4


def _activations(model: ModelSize, spec: FineTuneSpec) -> tuple[int, int]:
    """Of a micro-batch: what is kept, and what is made again of one layer at a time."""
    rows = spec.execution.micro_batch_size
    if not spec.execution.activation_checkpointing:
        return rows * model.activation_row_bytes, 0
    one_layer = (model.activation_row_bytes - model.recomputed_row_bytes) // max(model.layers, 1)
    return rows * model.recomputed_row_bytes, rows * one_layer


def host_memory(model: ModelSize, spec: FineTuneSpec, place: Place, device: DeviceMemory) -> HostMemory:
    """What the first node needs: it also holds the whole model for the export."""
    ranks = place.ranks_per_node
    processes = ranks * PROCESS_BYTES[place.device]
    on_cpu = ranks * (device.total - device.reserve) if place.device == "cpu" else 0
    staging = ranks * checkpoint_bytes(model, place.ranks) // place.ranks
    export = export_bytes(model, spec)
    return HostMemory(
        processes=processes,
        device=on_cpu,
        staging=staging,
        export=export,
        total=processes + on_cpu + staging + export,
    )
