"""Which DeepSpeed keys `spec.deepspeed.config` may hold. Every key of DeepSpeed 0.19 is in exactly one table here.

DeepSpeed ignores a top-level key it does not know, and a wrong one fails only once the nodes are there. So each key is
judged when the manifest is read; a test compares the tables with the installed DeepSpeed.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import cast

from dsft_api.problem import Problem

_ROOT = "spec.deepspeed.config"
_ZERO = "zero_optimization"

# The manifest has a field of its own for these.
OWNED: dict[str, str] = {
    "train_batch_size": "spec.training.globalBatchSize",
    "train_micro_batch_size_per_gpu": "spec.execution.microBatchSize",
    "gradient_accumulation_steps": "spec.training.globalBatchSize and spec.execution.microBatchSize",
    "managed_gradient_accumulation": "spec.training.globalBatchSize and spec.execution.microBatchSize",
    "gradient_clipping": "spec.training.gradientClipping",
    "optimizer": "spec.training.optimizer",
    "zero_allow_untested_optimizer": "spec.training.optimizer",
    "zero_force_ds_cpu_optimizer": "spec.deepspeed.offload.optimizer",
    "scheduler": "spec.training.schedule",
    "fp16": "spec.training.precision",
    "bf16": "spec.training.precision",
    "bfloat16": "spec.training.precision",
    "torch_autocast": "spec.training.precision",
    "data_types.param_dtype": "spec.training.precision",
    "activation_checkpointing": "spec.execution.activationCheckpointing",
    "checkpoint": "spec.checkpoint",
    "datastates_ckpt": "spec.checkpoint",
    "tensorboard": "spec.tracking.tensorboard",
    "wandb": "spec.tracking.wandb",
    "comet": "spec.tracking",
    "csv_monitor": "spec.tracking",
    "data_efficiency": "spec.data",
    "dataloader_drop_last": "spec.data",
    f"{_ZERO}.stage": "spec.deepspeed.stage",
    f"{_ZERO}.offload_optimizer": "spec.deepspeed.offload.optimizer",
    f"{_ZERO}.cpu_offload": "spec.deepspeed.offload.optimizer",
    f"{_ZERO}.offload_param": "spec.deepspeed.offload.params",
    f"{_ZERO}.cpu_offload_param": "spec.deepspeed.offload.params",
    f"{_ZERO}.cpu_offload_use_pin_memory": "spec.deepspeed.offload",
    f"{_ZERO}.zenflow": "spec.deepspeed.offload",
    f"{_ZERO}.stage3_gather_16bit_weights_on_model_save": "spec.export",
    f"{_ZERO}.stage3_gather_fp16_weights_on_model_save": "spec.export",
}

# DeepSpeed 0.19 raises DeepSpeedConfigError for these (runtime/config.py, _REMOVED_*).
REMOVED: frozenset[str] = frozenset(
    {
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
        f"{_ZERO}.mics_hierarchical_params_gather",
        f"{_ZERO}.mics_shard_size",
        f"{_ZERO}.zeropp_loco_param",
    }
)

_COMPILES = "would start a compiler during training"
_CHANGES_CHECKPOINTS = "changes how checkpoints are written or read, on which resuming relies"
_OTHER_STAGE = "has an effect at ZeRO stages 1 and 2 only, and the run uses stage 3"
_OTHER_PARALLELISM = "asks for a parallelism other than ZeRO-3 data parallelism"
_NOT_AT_STAGE_3 = "is not supported by DeepSpeed at ZeRO stage 3"
_NO_EFFECT = "has no effect in a fine-tuning run"

# DeepSpeed knows these, but a run would fail or not do what they say.
UNSUITABLE: dict[str, str] = {
    "aio": "serves offload to NVMe, which is not offered",
    "autotuning": "starts experiments of DeepSpeed's own launcher, which is not used",
    "compile": _COMPILES,
    "disable_allgather": _NO_EFFECT,
    "expert_parallel": _OTHER_PARALLELISM,
    "gradient_allreduce_op": _NOT_AT_STAGE_3,
    "gradient_predivide_factor": _NOT_AT_STAGE_3,
    "hybrid_engine": "is for reinforcement learning",
    "pipeline": _OTHER_PARALLELISM,
    "prescale_gradients": _NOT_AT_STAGE_3,
    "seq_parallel_communication_data_type": _OTHER_PARALLELISM,
    "sequence_parallel_size": _OTHER_PARALLELISM,
    "tensor_parallel": _OTHER_PARALLELISM,
    "use_data_before_expert_parallelism": _OTHER_PARALLELISM,
    "vocabulary_size": _NO_EFFECT,
    "weight_quantization": "is for inference",
    f"{_ZERO}.allgather_bucket_size": _OTHER_STAGE,
    f"{_ZERO}.allgather_partitions": _OTHER_STAGE,
    f"{_ZERO}.compute_grad_norm": _OTHER_STAGE,
    f"{_ZERO}.elastic_checkpoint": _CHANGES_CHECKPOINTS,
    f"{_ZERO}.ignore_unused_parameters": _OTHER_STAGE,
    f"{_ZERO}.legacy_stage1": _OTHER_STAGE,
    f"{_ZERO}.load_from_fp32_weights": _CHANGES_CHECKPOINTS,
    f"{_ZERO}.parameter_alignment": _OTHER_STAGE,
    f"{_ZERO}.pipeline_loading_checkpoint": _CHANGES_CHECKPOINTS,
    f"{_ZERO}.round_robin_gradients": _OTHER_STAGE,
    f"{_ZERO}.save_muon_momentum_buffer_in_memory": "serves the Muon optimizer, and the run uses AdamW",
    f"{_ZERO}.use_multi_rank_bucket_allreduce": _OTHER_STAGE,
    f"{_ZERO}.zero_quantized_gradients": _COMPILES,
    f"{_ZERO}.zero_quantized_nontrainable_weights": _COMPILES,
    f"{_ZERO}.zero_quantized_weights": _COMPILES,
}

# The user's to set.
FREE: frozenset[str] = frozenset(
    {
        "communication_data_type",
        "comms_logger",
        "data_types",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "log_level",
        "memory_breakdown",
        "steps_per_print",
        "timers",
        "wall_clock_breakdown",
        _ZERO,
        f"{_ZERO}.contiguous_gradients",
        f"{_ZERO}.enable_sanity_checks",
        f"{_ZERO}.leaf_module",
        f"{_ZERO}.log_trace_cache_warnings",
        f"{_ZERO}.memory_efficient_linear",
        f"{_ZERO}.overlap_comm",
        f"{_ZERO}.override_module_apply",
        f"{_ZERO}.reduce_bucket_size",
        f"{_ZERO}.reduce_scatter",
        f"{_ZERO}.stage3_allgather_sequential",
        f"{_ZERO}.stage3_max_live_parameters",
        f"{_ZERO}.stage3_max_reuse_distance",
        f"{_ZERO}.stage3_model_persistence_threshold",
        f"{_ZERO}.stage3_module_granularity_threshold",
        f"{_ZERO}.stage3_param_persistence_threshold",
        f"{_ZERO}.stage3_prefetch_bucket_size",
        f"{_ZERO}.stage3_use_all_reduce_for_fetch_params",
        f"{_ZERO}.sub_group_size",
        f"{_ZERO}.zero_hpz_partition_size",
    }
)

# Blocks whose own keys are judged one by one, and of those the ones all of whose keys are listed above.
_BLOCKS = (_ZERO, "data_types")
_LISTED_BLOCKS = (_ZERO,)


def known_keys(block: str | None = None) -> frozenset[str]:
    """All keys that DeepSpeed has at the top level, or in a block, by their own names (REMOVED ones left out)."""
    paths = OWNED.keys() | UNSUITABLE.keys() | FREE
    if block is None:
        return frozenset(path for path in paths if "." not in path)
    return frozenset(path.removeprefix(f"{block}.") for path in paths if path.startswith(f"{block}."))


def check_config(config: Mapping[str, object]) -> Iterator[Problem]:
    """The problems of a user's `spec.deepspeed.config`."""
    for key, value in config.items():
        yield from _check_key(key, value)
        if key not in _BLOCKS:
            continue
        if not isinstance(value, Mapping):
            yield Problem(f"{_ROOT}.{key}", "must be a mapping", f"write {key}: {{KEY: VALUE}}", value)
            continue
        for inner, inner_value in cast("Mapping[str, object]", value).items():
            yield from _check_key(f"{key}.{inner}", inner_value)


def _check_key(path: str, value: object) -> Iterator[Problem]:
    field = f"{_ROOT}.{path}"
    block, _, _ = path.rpartition(".")
    if path in OWNED:
        yield Problem(field, "is decided by the manifest", f"remove it; use {OWNED[path]}")
    elif path in REMOVED:
        yield Problem(field, "was removed from DeepSpeed, which fails on it", "remove it")
    elif path in UNSUITABLE:
        yield Problem(field, UNSUITABLE[path], "remove it")
    elif value == "auto" and block in ("", _ZERO):
        yield Problem(
            field, "auto is filled in by the Hugging Face Trainer, which is not used here", "give a value, or remove it"
        )
    elif path not in FREE and block in ("", *_LISTED_BLOCKS):
        yield _unknown(field, path, block)


def _unknown(field: str, path: str, block: str) -> Problem:
    key = path.removeprefix(f"{block}.")
    known = known_keys(block or None)
    if near := get_close_matches(key, sorted(known), n=1):
        return Problem(field, f"unknown DeepSpeed key; did you mean {near[0]}?", f"rename it to {near[0]}")
    if not block and key in known_keys(_ZERO):
        return Problem(field, "unknown DeepSpeed key at this level", f"move it into {_ZERO}")
    return Problem(
        field, "unknown DeepSpeed key", "remove it, or look it up at https://www.deepspeed.ai/docs/config-json/"
    )
