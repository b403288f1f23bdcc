"""The programs of examples/programs with tiny models and data: what is other than in their manifests.

A program is called by `programs/probed.py`, which has what each needs where there is no GPU, and looks at what DeepSpeed does.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.trainer import tiny

Document = dict[str, Any]
EXAMPLES = Path(__file__).parents[2] / "examples" / "programs"
PROBED = Path(__file__).parent / "programs"
BATCH, RANKS = 4, 2
ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0}
DEEPSPEED = {"train_micro_batch_size_per_gpu": BATCH, "zero_optimization": ZERO}
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}


@dataclass(frozen=True)
class Length:
    """How long a run is: a commit after each epoch."""

    commits: int
    rows: int = 64

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.rows // BATCH // RANKS

    @property
    def committed(self) -> list[int]:
        """The step of each commit."""
        return [self.steps * (number + 1) for number in range(self.commits)]


@dataclass(frozen=True)
class Example:
    """What is other than in the example's manifest, and how many of its lines are there for dsft."""

    lines: int
    model: str = "llama"
    config: Document = field(default_factory=dict[str, Any])


def examples(length: Length) -> dict[str, Example]:
    """All five, for two ranks without GPUs."""
    commits, every, last = length.commits, length.steps, length.committed[-1]
    bert: Document = {"epochs": commits, "deepspeed": DEEPSPEED | ADAMW}
    steps: Document = {"steps": last, "save_steps": every, "batch_size": BATCH, "deepspeed": DEEPSPEED}
    arguments = {
        "max_steps": last,
        "save_steps": every,
        "logging_steps": 1,
        "per_device_train_batch_size": BATCH,
    }
    lightning: Document = {
        "batch_size": BATCH,
        "deepspeed": {"zero_optimization": ZERO, "zero_allow_untested_optimizer": True},
        "trainer": {"max_epochs": commits, "accelerator": "cpu", "devices": RANKS, "enable_progress_bar": False},
    }
    return {
        "deepspeed_torch": Example(0, "bert", bert),
        "deepspeed_ray_data": Example(0, "bert", bert),
        "accelerate_lm": Example(3, config=steps),
        "transformers_trainer": Example(3, config={"deepspeed": DEEPSPEED, "arguments": arguments}),
        "lightning_lm": Example(3, config=lightning),
    }


def put_assets(folder: Path, length: Length) -> Path:
    """Both models and the rows of each."""
    tiny.llama(folder / "llama")
    tiny.bert(folder / "bert")
    tiny.dataset(folder, "text", length.rows)
    pairs = [
        {"sentence1": row["text"], "sentence2": row["textPair"], "label": row["label"]}
        for row in tiny.rows("pair", length.rows)
    ]
    tiny.write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


def manifest(name: str, length: Length, assets: Path) -> Document:
    """The example's, with what is in `assets`: a relative path begins where the module `probed` is."""
    document, example = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()), examples(length)[name]
    program = document["spec"]["program"]
    for field_name in ("entrypoint", "datasets") if "datasets" in program else ("entrypoint",):
        module, _, function = program[field_name].partition(":")
        assert module == name
        program[field_name] = f"probed:{function}"
    rows = assets / ("pairs.jsonl" if example.model == "bert" else "text.jsonl")
    program["config"] |= example.config | {
        "model": str(assets / example.model),
        "data": {"path": "json", "data_files": str(rows), "split": "train"},
        "probed": {"program": name},
    }
    program["config"] |= {"max_length": 128} if example.model == "llama" else {}
    spec = {"program": program, "execution": {"device": "cpu"}, "checkpoint": {"keepLast": length.commits}}
    return {**document, "spec": spec}
