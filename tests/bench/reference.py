"""What the model is worth after three epochs: our BERT/MRPC example beside the script that it replaces, at equal steps.

`python -m tests.bench.reference [--seeds 42,43,44] [--output json]`. Both train the same stand-in for BERT on the same stand-in
for MRPC (`reference_assets.py`), two ranks on CPU, fp32, in both variants: torch's DataLoader and Ray Data. Ours is
`examples/bert-mrpc.yaml` with the stand-ins put in; the other is `reference_script.py`. Ours are read from the status, while the
run goes on. The new head and dropout follow from the seed, the rows are always the same. Exits 1 if the mean over the seeds of
accuracy or F1 is worse after the last epoch by more than the seeds explain (two standard errors), if the steps differ, or if the
reference learned nothing, since such a comparison would say nothing.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.bench import reference_script
from tests.trainer.runs import Manifest, Run

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "bert-mrpc.yaml"
VARIANTS = ("torch", "ray-data")
ARMS = ("reference", "ours")
METRICS = ("accuracy", "f1")
# Half of the rows have each label.
CHANCE, LEARNED = 0.5, 0.15
STANDARD_ERRORS = 2.0
DEADLINE = 900.0
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Sample:
    """One run. `epochs`: step, accuracy and F1 after each; `seconds` of the whole command, its start included."""

    arm: str
    variant: str
    seed: int
    seconds: float
    epochs: list[dict[str, float]]


def environment() -> dict[str, str]:
    """Of every process here: nothing may ask the network."""
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "operator", "trainer_image"))
    return os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def command(module: str, *arguments: str) -> None:
    """Run a module of ours to its end, which must be a good one."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.bench.{module}", *arguments],
        env=environment(),
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-4000:]}")


def manifest(assets: Path, variant: str, seed: int) -> Manifest:
    """The example, with stand-ins for what is not here: Hub, bucket, and GPUs with their bf16."""
    document = yaml.safe_load(EXAMPLE.read_text())
    spec = document["spec"]
    spec["model"]["uri"] = (assets / "model").as_uri()
    train = spec["data"]["train"]
    for hub in ("subset", "split"):
        del train[hub]
    train["uri"] = (assets / "train.jsonl").as_uri()
    spec["data"] |= {"eval": {"uri": (assets / "validation.jsonl").as_uri()}, "loader": variant}
    spec["training"] |= {
        "globalBatchSize": reference_script.RANKS * spec["execution"]["microBatchSize"],
        "precision": "fp32",
        "seed": seed,
    }
    spec["execution"]["device"] = "cpu"
    for place in ("storage", "nodePools"):
        del spec[place]
    # The reference exports nothing.
    spec["export"] = {"format": "none"}
    return document


def run_ours(assets: Path, folder: Path, variant: str, seed: int) -> list[dict[str, float]]:
    """What the status told after each epoch."""
    run = Run(manifest(assets, variant, seed), folder)
    status, seen = run.local().status_file, dict[int, dict[str, float]]()
    begin = time.monotonic()
    with run.started("ray", reference_script.RANKS) as process:
        while process.poll() is None:
            if time.monotonic() - begin > DEADLINE:
                raise SystemExit(f"ours is not at its end after {DEADLINE:.0f} s:\n{run.log_tail()}")
            note(status, seen)
            time.sleep(LOOK_SECONDS)
    if process.returncode:
        raise SystemExit(f"ours ended with {process.returncode}:\n{run.log_tail()}")
    note(status, seen)
    (claim,) = run.claims()
    stored = {line["step"]: line for line in run.metrics(claim.id) if line["kind"] == "eval"}
    assert {step: line | seen.get(step, {}) for step, line in stored.items()} == stored, "status and metrics differ"
    assert seen.keys() == stored.keys(), f"the status told of the evaluations at {sorted(seen)}, of {sorted(stored)}"
    return [{"step": step} | {name: values[name] for name in METRICS} for step, values in sorted(seen.items())]


def note(status: Path, seen: dict[int, dict[str, float]]) -> None:
    """Look at the status file; it is replaced as a whole."""
    told: dict[str, Any] = yaml.safe_load(status.read_text()) if status.exists() else {}
    evaluation = told.get("status", {}).get("evaluation")
    if evaluation:
        seen[evaluation["step"]] = evaluation["metrics"]


def run_reference(assets: Path, folder: Path, variant: str, seed: int) -> list[dict[str, float]]:
    """What the script's result has."""
    folder.mkdir()
    for name in ("model", "train.jsonl", "validation.jsonl"):
        (folder / name).symlink_to(assets / name)
    command("reference_script", variant, str(seed), str(folder))
    reported = json.loads((folder / "metrics.json").read_text())
    return [{name: metrics[name] for name in ("step", *METRICS)} for metrics in reported]


def sample(assets: Path, arm: str, variant: str, seed: int) -> Sample:
    """One run, and its folder removed."""
    folder = assets / f"{arm}-{variant}-{seed}"
    begin = time.monotonic()
    run = run_ours if arm == "ours" else run_reference
    epochs = run(assets, folder, variant, seed)
    seconds = time.monotonic() - begin
    shutil.rmtree(folder)
    return Sample(arm, variant, seed, round(seconds, 1), epochs)


@dataclass(frozen=True)
class Figure:
    """A metric of one arm after an epoch, over the seeds."""

    mean: float
    spread: float
    """Standard deviation."""

    @classmethod
    def of(cls, values: list[float]) -> "Figure":
        """At least two."""
        return cls(statistics.mean(values), statistics.stdev(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.spread:.3f}"


def figures(samples: list[Sample], arm: str, variant: str, metric: str) -> list[Figure]:
    """One for each epoch."""
    runs = [one.epochs for one in samples if (one.arm, one.variant) == (arm, variant)]
    return [Figure.of([values[metric] for values in epoch]) for epoch in zip(*runs, strict=True)]


def goals(samples: list[Sample]) -> dict[str, bool]:
    """Each with its figures, and whether it is met."""
    steps = {tuple(values["step"] for values in one.epochs) for one in samples}
    judged = {f"equal steps: {' and '.join(map(str, sorted(steps)))}": len(steps) == 1}
    for variant in VARIANTS:
        for metric in METRICS:
            theirs, ours = (figures(samples, arm, variant, metric)[-1] for arm in ARMS)
            seeds = len({one.seed for one in samples})
            error = STANDARD_ERRORS * ((theirs.spread**2 + ours.spread**2) / seeds) ** 0.5
            told = f"{variant}: {metric} {ours.mean:.3f}, the reference's {theirs.mean:.3f} - {error:.3f}"
            judged[f"{told} or more"] = ours.mean >= theirs.mean - error
        accuracy = figures(samples, "reference", variant, "accuracy")[-1].mean
        judged[f"{variant}: the reference learned: accuracy {accuracy:.3f}"] = accuracy >= CHANCE + LEARNED
    return judged


def table(samples: list[Sample]) -> str:
    """For the documents."""
    epochs = range(1, len(samples[0].epochs) + 1)
    titles = [f"{title}, epoch {epoch}" for title in ("Accuracy", "F1") for epoch in epochs]
    lines = [f"| Variant | Arm | {' | '.join(titles)} | Seconds |", f"|---|---|{'---|' * (len(titles) + 1)}"]
    for variant in VARIANTS:
        for arm in ARMS:
            cells = [str(figure) for metric in METRICS for figure in figures(samples, arm, variant, metric)]
            seconds = statistics.median(one.seconds for one in samples if (one.arm, one.variant) == (arm, variant))
            lines.append(f"| {variant} | {arm} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> int:
    """All seeds, variants and arms in turns; the table, or all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="42,43,44", help="two at least, separated by commas")
    parser.add_argument("--output", choices=["table", "json"], default="table")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if len(seeds) < 2:
        parser.error("--seeds: one alone has no spread")
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as name:
        assets = Path(name)
        command("reference_assets", name)
        for seed in seeds:
            for variant in VARIANTS:
                for arm in ARMS:
                    samples.append(sample(assets, arm, variant, seed))
                    print(json.dumps(asdict(samples[-1])), file=sys.stderr, flush=True)
    judged = goals(samples)
    if options.output == "json":
        print(json.dumps({"samples": [asdict(one) for one in samples], "goals": judged}, indent=1))
    else:
        print(table(samples))
        for goal, met in judged.items():
            print(f"{'met   ' if met else 'MISSED'} {goal}")
    return 0 if all(judged.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
