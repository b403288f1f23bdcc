"""The DeepSpeed ZeRO-3 engine: its configuration, its optimizer, and the state it saves and loads.

The optimizer is torch's own AdamW over DeepSpeed's partitions: DeepSpeed's fused one would start a compiler on first use.
"""

import math
import random
import shutil
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dsft_api.batch import BatchPlan
from dsft_api.conditions import FailureClass
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.identity import OptimizerSpec, ScheduleSpec
from dsft_trainer.checkpoint.staging import Buffers, Snapshot, StagedFiles
from dsft_trainer.errors import TrainerError
from dsft_trainer.frozen import frozen_digest

# Of the weights below adapters, in each rank's model states.
FROZEN_DIGEST = "dsft_frozen_digest"


def deepspeed_config(spec: FineTuneSpec, plan: BatchPlan, *, universal: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: ours, with `spec.deepspeed.config` merged in.

    `universal` for an engine that will load a converted checkpoint; it saves ordinary ones all the same.
    """
    training = spec.workload().training
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": training.gradient_clipping,
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": training.precision == "fp16"},
        "zero_optimization": {"stage": spec.deepspeed.stage},
        "checkpoint": {"load_universal": universal},
    }
    return merged(ours, spec.deepspeed.config)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, objects key by key."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def lr_factor(schedule: ScheduleSpec, total_steps: int) -> Callable[[int], float]:
    """Learning rate as a share of its peak, by number of steps done (0 before the first)."""
    warmup, floor = schedule.warmup_steps, schedule.min_lr_ratio

    def factor(step: int) -> float:
        if step < warmup and schedule.warmup_type == "log":
            # DeepSpeed's WarmupLR without its first two steps, in which the rate is 0.
            return math.log(step + 2) / math.log(warmup + 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if schedule.type == "constant":
            return 1.0
        if schedule.type == "linear":
            return floor + (1 - floor) * (1 - done)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed, biases and norm weights are not. Under zero.Init the true shape is `ds_shape`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    others = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {name: value for name, value in group.items() if name != "params"}


@dataclass(frozen=True)
class StepInfo:
    """What one optimizer step did."""

    applied: bool
    grad_norm: float | None
    learning_rate: float


class Engine:
    """DeepSpeed's engine of this rank, and everything else that a checkpoint must hold of it."""

    def __init__(
        self, deepspeed_engine: Any, model: nn.Module, device: torch.device, frozen_digest: str | None = None
    ) -> None:
        self.deepspeed = deepspeed_engine
        self.model = model
        self.device = device
        self._frozen_digest = frozen_digest
        """Of what lies below adapters; None if there are none."""
        self._buffers = Buffers()

    @property
    def process_group(self) -> dist.ProcessGroup:
        """What DeepSpeed's collectives run on: a clone of the default group, which has torch's timeout and not ours."""
        return self.deepspeed.data_parallel_group

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The model's logits."""
        return self.deepspeed(**{name: tensor.to(self.device) for name, tensor in inputs.items()}).logits

    def summed_loss(self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """The loss that a model with `chunked_loss.install` gives itself, without logits."""
        moved = {name: tensor.to(self.device) for name, tensor in {**inputs, "labels": labels}.items()}
        return self.deepspeed(**moved).loss

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients. DeepSpeed divides by the accumulation steps and averages over ranks."""
        self.deepspeed.backward(loss)

    def micro_step(self) -> None:
        """Close a micro-step that is not the last of its batch."""
        self.deepspeed.step()

    def step(self) -> StepInfo:
        """Close the last micro-step: clip, update, advance the schedule."""
        learning_rate = float(self.deepspeed.get_lr()[0])
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        grad_norm = float(norm) if norm is not None else None
        if grad_norm is not None and not math.isfinite(grad_norm):
            grad_norm = None
        return StepInfo(bool(self.deepspeed.was_step_applied()), grad_norm, learning_rate)

    def train(self) -> None:
        """Switch dropout on."""
        self.deepspeed.train()

    def eval(self) -> None:
        """Switch dropout off."""
        self.deepspeed.eval()

    def rng_state(self) -> dict[str, Any]:
        """All random generators that training draws from, on this rank."""
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def stage(self, folder: Path, tag: str) -> StagedFiles:
        """Copy this rank's ZeRO shards and RNG into host memory, and let go of the copies made before. Collective.

        Of weights below adapters only a digest: they come from where the model is. `folder` is for what DeepSpeed puts beside
        them (a script that a checkpoint does not need); it is removed.
        """
        self._buffers.reuse()
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, Snapshot] = {}
        writer = self.deepspeed.checkpoint_engine
        # DeepSpeed's hook for other ways to write: it calls this with each file's content and path.
        self.deepspeed.checkpoint_engine = _Stager(writer, folder / tag, files, self._buffers)
        try:
            self.deepspeed.save_checkpoint(
                str(folder),
                tag=tag,
                client_state={FROZEN_DIGEST: self._frozen_digest} if self._frozen_digest else {},
                save_latest=False,
                exclude_frozen_parameters=self._frozen_digest is not None,
            )
        finally:
            self.deepspeed.checkpoint_engine = writer
        files[f"rng-{dist.get_rank()}.pt"] = Snapshot.of(self.rng_state(), self._buffers)
        self._buffers.finish()
        shutil.rmtree(folder, ignore_errors=True)
        return StagedFiles(files)

    def load(self, folder: Path, tag: str) -> None:
        """Take the state over from `folder/tag`. Collective; only for a fresh engine."""
        self._load(folder, tag)
        # Our own file, its digest checked against the commit: not a foreign pickle.
        self.set_rng_state(torch.load(folder / tag / f"rng-{dist.get_rank()}.pt", weights_only=False))

    def load_universal(self, folder: Path, tag: str) -> None:
        """Take the state over from the universal checkpoint `folder/tag`, but for the random generators. Collective.

        Only for a fresh engine with `deepspeed_config(universal=True)`.
        """
        self._load(folder, tag)
        self._complete_optimizer(torch.load(folder / tag / "zero" / "optimizer_state.pt", weights_only=False))

    def load_weights(self, folder: Path, tag: str) -> None:
        """Take only the weights over from such a checkpoint: optimizer and schedule are as if it had just been made."""
        optimizer: torch.optim.Optimizer = self.deepspeed.optimizer.optimizer
        fresh = [_settings(group) for group in optimizer.param_groups]
        self._load(folder, tag, load_lr_scheduler_states=False)
        for group, settings in zip(optimizer.param_groups, fresh, strict=True):
            group.update(settings)
        for state in optimizer.state.values():
            state.update({name: torch.zeros_like(value) for name, value in state.items()})
        self.deepspeed.global_steps = self.deepspeed.global_samples = self.deepspeed.skipped_steps = 0

    def _complete_optimizer(self, saved: Mapping[str, Any]) -> None:
        """Put right what DeepSpeed 0.19 makes of torch's AdamW when it loads a universal checkpoint.

        It gives all parameter groups the settings of the first one, so that biases would be decayed like matrices. And it gives
        all partitions one and the same counter of steps, which each of them would then advance.
        """
        optimizer: torch.optim.Optimizer = self.deepspeed.optimizer.optimizer
        groups = saved["optimizer_state_dict"]["param_groups"]
        for group, was in zip(optimizer.param_groups, groups, strict=True):
            group.update(_settings(was))
        for state in optimizer.state.values():
            state["step"] = state["step"].clone()

    def _load(self, folder: Path, tag: str, **options: bool) -> None:
        self._check_model(folder / tag)
        # Weights below adapters are not there. That nothing trained is missing has just been checked.
        strict = self._frozen_digest is None
        path, _ = self.deepspeed.load_checkpoint(str(folder), tag=tag, load_module_strict=strict, **options)
        if path is None:
            raise TrainerError(FailureClass.UNKNOWN, f"DeepSpeed found nothing to load in checkpoint {tag}")

    def _check_model(self, folder: Path) -> None:
        """Refuse a checkpoint of another model, which DeepSpeed would load as far as its numbers go."""
        states = torch.load(next(folder.glob("*_model_states.pt")), weights_only=False, mmap=True)
        there = {name: tuple(shape) for group in states["param_shapes"] for name, shape in group.items()}
        here = {
            name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.model.named_parameters() if p.requires_grad
        }
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise TrainerError(
                    FailureClass.CONFIG_INVALID,
                    f"checkpoint {folder.name} is of another model: {name} is {there.get(name)} there and "
                    f"{here.get(name)} here",
                    "start from a run of the same model",
                )
        if states.get(FROZEN_DIGEST, self._frozen_digest) != self._frozen_digest:
            raise TrainerError(
                FailureClass.CONFIG_INVALID,
                f"checkpoint {folder.name} holds adapters of another model: the weights that are not trained differ",
                "let spec.model name the model that they were trained on, as it was then",
            )

    def full_state_dict(self, *, trained_only: bool = False) -> dict[str, torch.Tensor]:
        """All weights, or those that are trained, gathered on rank 0's CPU; empty elsewhere. Collective."""
        return self.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_only) or {}


class _Stager:
    """Takes the place of DeepSpeed's checkpoint engine during one `save_checkpoint`, and keeps what it should write."""

    def __init__(self, writer: Any, folder: Path, files: MutableMapping[str, Snapshot], buffers: Buffers) -> None:
        self._writer = writer
        self._folder = folder
        self._files = files
        self._buffers = buffers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Called by DeepSpeed: a copy now, the file later."""
        self._files[Path(path).relative_to(self._folder).as_posix()] = Snapshot.of(state_dict, self._buffers)


def without_compiled_ops() -> None:
    """Keep DeepSpeed's CPU backend from compiling its shared-memory op when the process group starts.

    The op only serves `inference_all_reduce`. There is no public switch; `comm/torch.py`, the one reader of this table in
    DeepSpeed 0.19, takes an op that is not in it for incompatible. Even reading the table would first probe all ops with the
    compiler, so it is put there before anybody does.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def start_engine(
    model: nn.Module,
    config: Mapping[str, Any],
    optimizer: OptimizerSpec,
    schedule: ScheduleSpec,
    total_steps: int,
    device: torch.device,
) -> Engine:
    """`deepspeed.initialize` for a model that was built under zero.Init.

    Raises:
        TrainerError: ConfigInvalid if what came out is not DeepSpeed at the stage that was asked for.
    """
    import deepspeed

    adamw = torch.optim.AdamW(
        _parameter_groups(model, optimizer.weight_decay),
        lr=optimizer.learning_rate,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.epsilon,
        # One pass over memory instead of ten; on CPU too.
        fused=True,
    )
    factor = lr_factor(schedule, total_steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw,
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, factor),
        config=dict(config),
    )
    stage = config["zero_optimization"]["stage"]
    if engine.zero_optimization_stage() != stage:
        raise TrainerError(
            FailureClass.CONFIG_INVALID, f"DeepSpeed runs at ZeRO stage {engine.zero_optimization_stage()}, not {stage}"
        )
    # Some models freeze weights themselves, such as fixed positions: those stay in the checkpoint.
    has_adapters = hasattr(model, "peft_config")
    return Engine(engine, model, device, frozen_digest(model, device) if has_adapters else None)
