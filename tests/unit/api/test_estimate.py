"""The estimate: what the numbers of a run come to, and which single field is named where they do not fit."""

from collections import Counter
from typing import Any

import pytest

from dsft_api.estimate.devices import gpu_bytes
from dsft_api.estimate.memory import checkpoint_bytes, device_memory, export_bytes, host_memory
from dsft_api.estimate.plan import plan_run
from dsft_api.estimate.sizes import DataSize, ModelSize, Place, ZeroSettings, share
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.placement import NodePool

GIB = 2**30


def spec(**changes: dict[str, Any]) -> FineTuneSpec:
    """A causal-lm in bf16; `changes` are laid over its sections."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"uri": "hf://a/b", "task": "causal-lm"},
        "data": {"train": {"uri": "hf://c/d", "format": "text"}, "maxLength": 4096},
        "training": {"maxSteps": 100, "globalBatchSize": 64, "optimizer": {"learningRate": 1e-5}},
        "execution": {"device": "cuda", "microBatchSize": 4},
    }
    return FineTuneSpec.model_validate(
        sections | {name: sections.get(name, {}) | part for name, part in changes.items()}
    )


def model(**changes: Any) -> ModelSize:
    """8 billion weights in tensors of 16 million, and one of 500 million."""
    numbers: dict[str, Any] = {
        "trainable": Counter({16_000_000: 470, 500_000_000: 1}),
        "frozen": Counter(),
        "layers": 32,
        "largest_module": 500_000_000,
        "length": 4096,
        "activation_row_bytes": 20 * GIB,
        "recomputed_row_bytes": GIB,
        "logits_per_row": 4096 * 128_000,
        "max_positions": 8192,
    }
    return ModelSize(**(numbers | changes))


def place(**changes: Any) -> Place:
    """One node of 8 GPUs."""
    return Place(**({"device": "cuda", "ranks": 8, "nodes": 1, "ranks_per_node": 8} | changes))


DATA = DataSize(rows=1000, eval_rows=100, counted=1000, tokens=500_000, longest=4000, positions=4000)


def test_each_tensor_is_cut_by_itself_and_padded() -> None:
    assert share({10: 1, 3: 2}, 4) == 3 + 2 * 1


@pytest.mark.parametrize(
    ("precision", "parameters", "state", "gradients"),
    [("bf16", 2, 12, 2), ("fp16", 2, 12, 2), ("fp32", 4, 12, 4)],
)
def test_what_a_rank_holds_of_each_weight(precision: str, parameters: int, state: int, gradients: int) -> None:
    memory = device_memory(model(), spec(training={"precision": precision}), place(), evaluates=False)
    mine = 8_020_000_000 // 8
    assert (memory.parameters, memory.optimizer_state, memory.gradients) == (
        parameters * mine,
        state * mine,
        gradients * mine,
    )


def test_frozen_weights_have_neither_gradients_nor_optimizer_state() -> None:
    lora = model(trainable={1_000_000: 8}, frozen={16_000_000: 500})
    memory = device_memory(lora, spec(), place(), evaluates=False)
    assert (memory.parameters, memory.optimizer_state, memory.gradients) == (2 * 1_001_000_000, 12_000_000, 2_000_000)
    assert checkpoint_bytes(lora, 8) == 12 * 8_000_000


@pytest.mark.parametrize(
    ("training", "export", "expected"),
    [
        ({}, {}, 2 * 8_008_000_000),
        ({"lora": {}}, {}, 2 * 8_008_000_000),
        ({"lora": {}}, {"mergeLora": False}, 2 * 8_000_000),
        ({}, {"format": "none"}, 0),
    ],
    ids=["model", "merged", "adapter", "none"],
)
def test_what_is_exported(training: dict[str, Any], export: dict[str, Any], expected: int) -> None:
    lora = model(trainable={1_000_000: 8}, frozen={16_000_000: 500})
    assert export_bytes(lora, spec(training=training, export=export)) == expected


@pytest.mark.parametrize(
    ("changes", "kind", "expected"),
    [
        ({"zero_optimization": {"reduce_bucket_size": 2e8}}, "buckets", 400_000_000),
        ({"zero_optimization": {"stage3_max_reuse_distance": 0}}, "live_parameters", 2 * 550_000_000),
        ({"zero_optimization": {"sub_group_size": 1e6}}, "step", 6_000_000),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "gradients", 4 * 1_002_500_000),
    ],
)
def test_settings_of_deepspeed_count(changes: dict[str, Any], kind: str, expected: int) -> None:
    memory = device_memory(model(), spec(deepspeed={"config": changes}), place(), evaluates=False)
    assert getattr(memory, kind) == expected


def test_a_small_model_is_never_more_than_whole() -> None:
    small = model(trainable={1000: 10}, largest_module=1000)
    assert device_memory(small, spec(), place(), evaluates=False).live_parameters == 2 * 10_000


def test_with_activation_checkpointing_little_is_kept_and_one_layer_made_again() -> None:
    memory = device_memory(model(), spec(execution={"activationCheckpointing": True}), place(), evaluates=False)
    assert (memory.activations, memory.recomputed) == (4 * GIB, 4 * (19 * GIB // 32))


def test_of_chunked_logits_there_is_one_chunk() -> None:
    chunked = spec(execution={"microBatchSize": 4, "lossKernel": "chunked"})
    memory = device_memory(model(), chunked, place(), evaluates=True)
    assert (memory.logits, memory.evaluation) == (14 * 524 * 128_000, 10 * 524 * 128_000)
    small = model(logits_per_row=4096 * 10)
    assert device_memory(small, chunked, place(), evaluates=False).logits == 14 * 4 * 4096 * 10


def test_on_cpu_the_host_holds_what_a_gpu_would() -> None:
    here = place(device="cpu", ranks=2, ranks_per_node=2)
    asked = spec(execution={"device": "cpu"}, export={"format": "none"})
    device = device_memory(model(), asked, here, evaluates=False)
    host = host_memory(model(), asked, here, device)
    assert host.device == 2 * (device.total - device.reserve)
    assert host.export == 0


def test_the_host_holds_a_copy_of_the_checkpoint_and_at_the_end_the_model() -> None:
    host = host_memory(model(), spec(), place(), device_memory(model(), spec(), place(), evaluates=False))
    assert host.staging == 12 * 8_020_000_000
    assert host.export == 2 * 8_020_000_000


EIGHTY = 80 * GIB
FITS: tuple[tuple[str, dict[str, Any], dict[str, Any], int, str | None], ...] = (
    ("it fits", {}, {"activation_row_bytes": GIB}, EIGHTY, None),
    ("smaller micro-batches fit", {}, {}, EIGHTY, "spec.execution.microBatchSize: set it to 2"),
    ("whole logits are what is too much", {}, {"activation_row_bytes": GIB}, 48 * GIB,
     "spec.execution.lossKernel: set it to chunked"),
    ("only recomputing fits", {"execution": {"microBatchSize": 1}}, {"activation_row_bytes": 90 * GIB}, EIGHTY,
     "spec.execution.activationCheckpointing: set it to true"),
    ("the state needs more nodes", {"execution": {"microBatchSize": 1, "activationCheckpointing": True, "lossKernel": "chunked"}},
     {}, 20 * GIB, "spec.nodePools[].nodes: set it to 2"),
    ("evaluation is what is too much", {"execution": {"microBatchSize": 1, "evalBatchSize": 16, "activationCheckpointing": True},
     "data": {"evalFraction": 0.1}}, {}, EIGHTY, "spec.execution.evalBatchSize: set it to 1"),
    ("nothing single fits", {"execution": {"microBatchSize": 1}}, {"activation_row_bytes": 2000 * GIB}, 10 * GIB,
     "spec.nodePools: no single field makes it fit"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "size", "gpu", "expected"), [row[1:] for row in FITS], ids=[row[0] for row in FITS]
)
def test_what_does_not_fit_names_the_field_that_makes_it_fit(
    changes: dict[str, Any], size: dict[str, Any], gpu: int, expected: str | None
) -> None:
    planned = plan_run(spec(**changes), place(gpu_bytes=gpu), model(**size), DATA)
    told = [f"{problem.field}: {problem.remedy}" for problem in planned.problems]
    assert told == [] if expected is None else told[0].startswith(expected)


def test_what_is_named_as_remedy_fits() -> None:
    planned = plan_run(spec(), place(gpu_bytes=EIGHTY), model(), DATA)
    rows = int(planned.problems[0].remedy.rpartition(" ")[2])
    assert plan_run(spec(execution={"microBatchSize": rows}), place(gpu_bytes=EIGHTY), model(), DATA).problems == ()


@pytest.mark.parametrize(
    ("changes", "where", "data", "field"),
    [
        ({"training": {"globalBatchSize": 60}}, {}, DATA, "spec.training.globalBatchSize"),
        ({}, {}, DataSize(50, 0, 50, 100, 10, 10), "spec.training.globalBatchSize"),
        ({}, {}, DataSize(1000, 0, 1000, 100, 9000, 9000), "spec.data.maxLength"),
        ({}, {"host_bytes": 64 * GIB}, DATA, "spec.nodePools[].resources"),
    ],
    ids=["ranks do not divide the batch", "too few rows", "rows longer than positions", "nodes too small"],
)
def test_other_things_that_do_not_fit(
    changes: dict[str, Any], where: dict[str, Any], data: DataSize, field: str
) -> None:
    assert [problem.field for problem in plan_run(spec(**changes), place(**where), model(), data).problems] == [field]


def test_without_the_memory_of_gpus_and_nodes_there_is_no_verdict() -> None:
    assert plan_run(spec(), place(), model(activation_row_bytes=10**13), DATA).problems == ()


def test_steps_tokens_and_checkpoints() -> None:
    planned = plan_run(
        spec(training={"maxSteps": None, "epochs": 2}, data={"evalFraction": 0.1}, checkpoint={"everySteps": 7}),
        place(storage_bytes_per_second=1e9),
        model(),
        DATA,
    )
    assert planned.data is not None
    assert planned.steps is not None
    assert planned.checkpoint is not None
    assert planned.batch is not None
    # 1000 rows are 15 batches of 64, and 40 rows are left over.
    assert (planned.data.steps_per_epoch, planned.data.tokens_per_epoch) == (15, 480_000)
    assert (planned.steps.steps, planned.steps.samples, planned.steps.evaluations) == (30, 1920, 2)
    # At 7, 14, 21, 28 and the end; two newest, the best, and one on its way.
    assert (planned.checkpoint.count, planned.checkpoint.bytes) == (5, 96_240_000_000)
    assert planned.checkpoint.stored_bytes == 4 * 96_240_000_000 + 16_040_000_000
    assert planned.checkpoint.upload_minutes == pytest.approx(1.604)
    assert planned.batch.valid_nodes == (1, 2)


def test_without_data_only_what_data_decides_is_left_out() -> None:
    planned = plan_run(spec(), place(), model(), None, ("data: no access",))
    assert planned.data is None
    assert planned.steps is not None
    assert (planned.steps.steps, planned.steps.tokens) == (100, None)
    assert planned.gpu_memory is not None
    assert planned.missing == ("data: no access",)


@pytest.mark.parametrize(
    ("products", "expected"),
    [
        (["NVIDIA-L4"], 23_034),
        (["NVIDIA-H100-80GB-HBM3", "NVIDIA-L4"], 23_034),
        (["NVIDIA-L4", "NVIDIA-Unheard-Of"], None),
        ([None], None),
    ],
)
def test_memory_of_gpus_by_their_label(products: list[str | None], expected: int | None) -> None:
    pools = [
        NodePool(name=f"p{i}", gpus_per_node=1, node_selector={"nvidia.com/gpu.product": product} if product else {})
        for i, product in enumerate(products)
    ]
    assert gpu_bytes(pools) == (expected * 2**20 if expected else None)


def test_the_defaults_are_those_of_the_installed_deepspeed() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs, ours = DeepSpeedZeroConfig(stage=3), ZeroSettings()
    assert {
        "reduce_bucket_size": theirs.reduce_bucket_size,
        "stage3_prefetch_bucket_size": theirs.prefetch_bucket_size,
        "stage3_max_reuse_distance": theirs.max_reuse_distance,
        "stage3_param_persistence_threshold": theirs.param_persistence_threshold,
        "sub_group_size": theirs.sub_group_size,
    } == {name: getattr(ours, name) for name in ours.__dataclass_fields__ if name != "grad_accum_dtype"}
