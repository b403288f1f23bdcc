"""One rank of what a practitioner uses in our place: Transformers' Trainer or TRL's SFTTrainer, with DeepSpeed ZeRO-3.

`torchrun --module tests.bench.frameworks_arm ARM FOLDER`, as `tests.bench.frameworks` starts it. FOLDER has told.json: settings,
model and rows, which each framework tokenises, batches and packs by itself. What is not told there is the framework's default.
A rank writes rank-<r>.json: tokens of each micro-step, loss of each step; the first one a line to `steps` when a step is done.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

# Or it compiles for half a minute.
deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
from accelerate import PartialState  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class Steps(TrainerCallback):
    """Tells which steps are done."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            with self.file.open("a") as lines:
                lines.write(f"{state.global_step}\n")


def distributed() -> None:
    """Let accelerate know that there are other ranks, and DeepSpeed.

    With `use_cpu` it would put torch's DDP in DeepSpeed's place, without a word. Without, it finds no backend for CPU ranks and
    takes each of them for the only one: DeepSpeed would average the gradients of the same rows.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]


def arguments(told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of either framework, for `distributed` ranks."""
    return {
        "accelerator_config": {"use_configured_state": True},
        "output_dir": str(folder / "output"),
        "deepspeed": told["deepspeed"],
        "max_steps": told["steps"],
        "per_device_train_batch_size": told["deepspeed"]["train_micro_batch_size_per_gpu"],
        "gradient_accumulation_steps": told["deepspeed"]["gradient_accumulation_steps"],
        "max_grad_norm": told["deepspeed"]["gradient_clipping"],
        "learning_rate": told["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "seed": told["seed"],
        "bf16": False,
        # The rows are in our order. Packed ones come sorted by length: shuffle those.
        "train_sampling_strategy": "random" if told["packing"] else "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def transformers_trainer(told: dict[str, Any], folder: Path, texts: Dataset) -> Trainer:
    """Transformers' Trainer."""
    # First: while they live, from_pretrained gives each rank its part of the weights only.
    args = TrainingArguments(**arguments(told, folder))
    tokenizer = AutoTokenizer.from_pretrained(told["model"])

    def encode(row: dict[str, str]) -> Any:
        return tokenizer(row["text"] + tokenizer.eos_token, truncation=True, max_length=told["max_length"])

    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32),
        args=args,
        train_dataset=texts.map(encode, remove_columns="text"),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def sft_trainer(told: dict[str, Any], folder: Path, texts: Dataset) -> Trainer:
    """TRL's SFTTrainer."""
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    args = SFTConfig(
        **arguments(told, folder),
        max_length=told["max_length"],
        packing=told["packing"],
        # Nobody else here computes activations twice.
        gradient_checkpointing=False,
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32),
        args=args,
        train_dataset=texts,
        processing_class=AutoTokenizer.from_pretrained(told["model"]),
    )


ARMS: dict[str, Callable[[dict[str, Any], Path, Dataset], Trainer]] = {
    "transformers": transformers_trainer,
    "trl": sft_trainer,
}


def count_tokens(model: Any) -> list[int]:
    """Tokens of each forward pass from now on, without padding."""
    counts: list[int] = []

    def count(_module: torch.nn.Module, _args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        counts.append(inputs["input_ids"].numel() if mask is None else int(mask.sum()))

    model.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def check(trainer: Trainer, told: dict[str, Any]) -> None:
    """Refuse to be measured as anything else than what the table says."""
    engine: Any = trainer.model_wrapped
    assert trainer.accelerator.num_processes == told["ranks"]
    assert issubclass(type(engine), deepspeed.DeepSpeedEngine), type(engine)
    assert engine.zero_optimization_stage() == 3
    assert engine.gradient_accumulation_steps() == told["deepspeed"]["gradient_accumulation_steps"]
    assert torch.distributed.get_world_size() == told["ranks"]
    assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.float32}
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def main(arm: str, folder: Path) -> None:
    """Train, and write what was seen."""
    told = json.loads((folder / "told.json").read_text())
    distributed()
    rows = [json.loads(line) for line in Path(told["rows"]).read_text().splitlines()]
    trainer = ARMS[arm](told, folder, Dataset.from_list(rows))
    trainer.add_callback(Steps(folder / "steps"))
    counts = count_tokens(trainer.model)
    trainer.train()
    check(trainer, told)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen = {"tokens": counts, "losses": losses}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
