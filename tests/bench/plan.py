"""`dsft plan` against a run: each estimate beside what was measured, for a few ways to train one model.

`python -m tests.bench.plan [--output json]`. A Llama of 16 million weights on two ranks with ZeRO-3, trained by the trainer's own
ranks while every tensor is counted (`tests.bench.plan_ranks`); checkpoint, steps and tokens are read from storage. Nothing is
timed, so other work on the machine does no harm. Exits 1 if an estimate is further off than 15 %, or one of the counts is off.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from dsft_api.estimate.plan import RunPlan
from dsft_api.estimate.sizes import Place
from dsft_api.job import Job, Ranks, RunRef
from dsft_api.resource import DeepSpeedFineTune, Metadata, spec_hash
from dsft_api.spec import FineTuneSpec
from dsft_cli.planning import plan
from dsft_trainer.checkpoint.listing import read_claims, read_commits
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.process import start_environment
from tests.trainer import tiny
from tests.trainer.runs import metrics_of

ROOT = Path(__file__).parents[2]
RANKS = 2
SECONDS = 1800.0
TOLERANCE = 0.15
EXACT = frozenset({"steps", "tokens per epoch", "parameters"})
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "microBatchSize": 4},
    "bf16": {"precision": "bf16", "microBatchSize": 4},
    "bf16, activations recomputed": {"precision": "bf16", "microBatchSize": 8, "activationCheckpointing": True},
}


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    estimated: float
    measured: float

    @property
    def off(self) -> float:
        """How much too large the estimate is, as a share of what was measured."""
        return self.estimated / self.measured - 1

    @property
    def holds(self) -> bool:
        """Whether it is as good as is promised."""
        return self.off == 0 if self.name in EXACT else abs(self.off) <= TOLERANCE


def make_model(folder: Path) -> None:
    """The model and its tokenizer in `folder`."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def make(folder: Path) -> None:
    """The model and rows of 100 to 150 tokens."""
    make_model(folder / "model")
    chance, words = random.Random(1), tiny.TEXT.split()
    rows = [{"text": " ".join(chance.choices(words, k=chance.randint(75, 105)))} for _ in range(48)]
    tiny.write_jsonl(folder / "text.jsonl", rows)


def spec_of(folder: Path, precision: str, **execution: Any) -> FineTuneSpec:
    """Two steps of 16 rows, evaluated and saved once."""
    return FineTuneSpec.model_validate(
        {
            "model": {"uri": (folder / "model").as_uri(), "task": "causal-lm"},
            "data": {
                "train": {"uri": (folder / "text.jsonl").as_uri(), "format": "text"},
                "evalFraction": 0.34,
                "maxLength": 256,
            },
            "training": {
                "epochs": 1,
                "globalBatchSize": 16,
                "optimizer": {"learningRate": 1e-3},
                "precision": precision,
            },
            "execution": {"device": "cpu", "evalBatchSize": 4, **execution},
            "tracking": {"tensorboard": False},
            # Smaller than the model, as it is for the models that need a plan.
            "deepspeed": {"config": {"zero_optimization": {"reduce_bucket_size": 10_000_000}}},
        }
    )


def rows_of(folder: Path, spec: FineTuneSpec) -> list[Row]:
    """Plan the run, run it, and compare."""
    resource = DeepSpeedFineTune(metadata=Metadata(name="planned"), spec=spec)
    place = Place(device="cpu", ranks=RANKS, nodes=1, ranks_per_node=RANKS, host_bytes=2**40)
    return compared(plan(resource, place, "bench", most_rows=1000), measured(folder, spec))


def measured(folder: Path, spec: FineTuneSpec) -> dict[str, float]:
    """Train for real in a new folder below `folder`; what each figure was."""
    place = Path(tempfile.mkdtemp(dir=folder))
    job = Job(
        run=RunRef(namespace="default", name="planned", uid=place.name),
        attempt=1,
        spec=spec,
        spec_hash=spec_hash(spec),
        storage_prefix=(place / "run").as_uri(),
        ranks=Ranks(count=RANKS, device="cpu", threads=1),
    )
    (place / "job.json").write_text(job.to_json())
    elastic = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
    done = subprocess.run(
        [*elastic, "-m", "tests.bench.plan_ranks", str(place)],
        env=os.environ
        | start_environment(job)
        | {
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "operator", "trainer_image")),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "DSFT_SCRATCH": str(place),
        },
        cwd=ROOT,
        check=False,
        timeout=SECONDS,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the ranks failed:\n{done.stderr[-4000:]}")
    seen: dict[str, float] = json.loads((place / "measured-0.json").read_text())
    store = open_store(job.storage_prefix)
    (claim,) = read_claims(store)
    trained = [line for line in metrics_of(store, claim.id) if line["kind"] == "train"]
    return seen | {
        "checkpoint": read_commits(store)[-1].bytes,
        "steps": len(trained),
        "tokens per epoch": sum(line["tokens"] for line in trained),
    }


def compared(planned: RunPlan, seen: dict[str, float]) -> list[Row]:
    """Estimates beside measurements, in bytes but for the counts."""
    assert planned.gpu_memory is not None
    assert planned.host_memory is not None
    assert planned.checkpoint is not None
    assert planned.steps is not None
    assert planned.data is not None
    assert planned.model is not None
    device, host = planned.gpu_memory, planned.host_memory
    kept = device.parameters + device.optimizer_state + device.gradients + device.buckets
    estimates = {
        "parameters": planned.model.parameters,
        "steps": planned.steps.steps,
        "tokens per epoch": planned.data.tokens_per_epoch,
        "checkpoint": planned.checkpoint.bytes,
        "weights of a rank": device.parameters,
        "optimizer state of a rank": device.optimizer_state,
        "gradients of a rank": device.gradients,
        "bucket of a rank": device.buckets,
        "staging of a rank": host.staging // RANKS,
        "most in forward and backward": kept
        + device.live_parameters
        + device.activations
        + max(device.logits, device.recomputed),
        "most in the optimizer step": kept + device.step,
        "most in an evaluation": kept + device.live_parameters + device.evaluation,
        # The first rank also holds the export.
        "memory of the first process": host.export + (host.total - host.export) // RANKS,
    }
    return [Row(name, estimate, seen[name]) for name, estimate in estimates.items()]


def table(rows: list[Row]) -> str:
    """For the documents."""

    def shown(row: Row, value: float) -> str:
        return f"{value:,.0f}" if row.name in EXACT else f"{value / 1e6:,.1f} MB"

    lines = [
        f"| {row.name} | {shown(row, row.estimated)} | {shown(row, row.measured)} | {100 * row.off:+.1f} % |"
        for row in rows
    ]
    return "\n".join(["| | Estimated | Measured | Off |", "|---|---|---|---|", *lines])


def main() -> int:
    """Every way; the tables, or all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", choices=["table", "json"], default="table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        result = {way: rows_of(folder, spec_of(folder, **settings)) for way, settings in WAYS.items()}
    if options.output == "json":
        print(json.dumps({way: [vars(row) for row in rows] for way, rows in result.items()}, indent=1))
    else:
        print("\n\n".join(f"{way}\n\n{table(rows)}" for way, rows in result.items()))
    return 0 if all(row.holds for rows in result.values() for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
