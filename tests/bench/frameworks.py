"""Ours against Transformers' Trainer and TRL's SFTTrainer, all with DeepSpeed ZeRO-3: tokens per CPU second, memory, losses.

`make bench-frameworks`, on an idle machine; it puts TRL into a folder of its own. One Llama of 16 million weights, the same
verses, seed, learning rate and DeepSpeed configuration, fp32, two ranks of one thread. Two layouts: padded, where the others are
given the rows in our order, so that every batch and every loss is the same; and packed, by each one's own packing. The arms
take turns. CPU seconds are those of the whole process tree between two steps; tokens are without padding. Exits 1 if ours
trains fewer tokens per CPU second than another one, or if padded losses are not the same.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from dsft_api.batch import plan_batch
from dsft_api.manifest import parse
from dsft_demo.render import read_pairs
from dsft_trainer.data.sampler import GlobalBatches
from dsft_trainer.engine import deepspeed_config
from tests.bench.launch import cpu_seconds, tree
from tests.bench.plan import make_model
from tests.trainer import tiny
from tests.trainer.runs import Manifest, Run, causal_lm, session

ROOT = Path(__file__).parents[2]
EXTRA = ROOT / ".venv" / "bench"
RANKS = 2
FIRST, LAST = 6, 16  # measured between these steps
STEPS = LAST + 2
ROWS = 1280
SEED, LEARNING_RATE = 42, 1e-3
DEADLINE = 600.0
LOOK_SECONDS = 0.02
GOAL = 1.0
# Equal batches give equal losses but for rounding, which grows from step to step.
SAME_LOSS = 0.001
LAST_LOSSES = 5
OURS, OURS_ON_RAY = "ours", "ours, on Ray"
# Arms of `frameworks_arm`.
OTHERS = {"HF Trainer": "transformers", "TRL SFTTrainer": "trl"}


@dataclass(frozen=True)
class Layout:
    """How rows become batches; about 2000 tokens a step."""

    name: str
    packing: bool
    max_length: int
    micro_batch_size: int
    global_batch_size: int
    arms: tuple[str, ...]


LAYOUTS = (
    Layout("padded", False, 256, 8, 32, (OURS, OURS_ON_RAY, *OTHERS)),
    # One sequence per pass: TRL lays the sequences of a pass end to end, which only pays with a flash attention. The Trainer
    # of Transformers does not pack.
    Layout("packed", True, 512, 1, 4, (OURS, OURS_ON_RAY, "TRL SFTTrainer")),
)


@dataclass(frozen=True)
class Sample:
    """One run of one arm. `tokens` and `losses` of each step."""

    layout: str
    arm: str
    tokens_per_cpu_second: float
    tokens_per_second: float
    peak_rss_gib: float
    tokens: list[int]
    losses: list[float]


@dataclass(frozen=True)
class Mark:
    """What a process tree had used when a step was done."""

    step: int
    cpu: float
    wall: float


def make(folder: Path) -> None:
    """The model; verses of quite different lengths."""
    make_model(folder / "model")
    verses = [{"text": pair.kjv} for pair in read_pairs("train")]
    tiny.write_jsonl(folder / "text.jsonl", random.Random(0).sample(verses, ROWS))


def manifest(folder: Path, layout: Layout) -> Manifest:
    """Training alone."""
    document = causal_lm(f"bench-{layout.name}", folder / "model", folder / "text.jsonl", steps=STEPS, seed=SEED)
    spec = document["spec"]
    spec["data"] |= {"maxLength": layout.max_length, "packing": layout.packing}
    spec["training"] |= {
        "globalBatchSize": layout.global_batch_size,
        "optimizer": {"learningRate": LEARNING_RATE, "weightDecay": 0.0},
    }
    spec["execution"]["microBatchSize"] = layout.micro_batch_size
    spec["checkpoint"] = {"everySteps": 1000}
    spec["export"] = {"format": "none"}
    return document


def tell(folder: Path, place: Path, layout: Layout) -> None:
    """What `frameworks_arm` needs: the same settings, and the rows as our sampler takes them."""
    spec = parse(yaml.safe_dump(manifest(folder, layout)), "bench").spec
    lines = (folder / "text.jsonl").read_text().splitlines(keepends=True)
    batches = GlobalBatches(len(lines), layout.global_batch_size, SEED)
    # Packing looks at all of them, and makes its own order.
    order = range(len(lines)) if layout.packing else [int(row) for step in range(STEPS) for row in batches.batch(step)]
    rows = place / "rows.jsonl"
    rows.write_text("".join(lines[row] for row in order))
    told = {
        "ranks": RANKS,
        "model": str(folder / "model"),
        "rows": str(rows),
        "packing": layout.packing,
        "max_length": layout.max_length,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
        "steps": STEPS,
        "deepspeed": deepspeed_config(spec, plan_batch(layout.global_batch_size, RANKS, layout.micro_batch_size)),
    }
    (place / "told.json").write_text(json.dumps(told))


@contextmanager
def started(command: list[str], log: Path, **env: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process of another framework."""
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "operator", ROOT / "trainer_image", EXTRA))
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with session(command, log, **{"PYTHONPATH": paths, **offline, **env}) as process:
        yield process


def watched(
    process: "subprocess.Popen[bytes]", step: Callable[[], int], log: Callable[[], str]
) -> tuple[Mark, Mark, float]:
    """Watch a run to its end: at the first and the last measured step, and its peak memory until then, GiB."""
    begin, marks, peak = time.monotonic(), dict[int, Mark](), 0.0
    while process.poll() is None and time.monotonic() - begin < DEADLINE:
        done = step()
        for wanted in (FIRST, LAST):
            if done >= wanted and wanted not in marks:
                marks[wanted] = Mark(done, cpu_seconds(process.pid), time.monotonic())
                peak = peak_rss(process.pid)
        time.sleep(LOOK_SECONDS)
    if process.poll() != 0 or len(marks) < 2:
        raise SystemExit(f"{process.args} ended with {process.poll()}, at step {step()}:\n{log()}")
    return marks[FIRST], marks[LAST], peak


def peak_rss(pid: int) -> float:
    """The largest resident set that a process of the tree had so far, GiB."""
    sizes = [0]
    for process in tree(pid):
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        sizes += [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return max(sizes) / 2**20


def run_ours(folder: Path, place: Path, layout: Layout, arm: str) -> Sample:
    """`dsft run`."""
    run = Run(manifest(folder, layout), place / "run")

    def step() -> int:
        told = run.told()
        return told.progress.step if told is not None and told.progress is not None else 0

    with run.started("ray" if arm == OURS_ON_RAY else "torchrun", RANKS) as process:
        seen = watched(process, step, run.log_tail)
    (claim,) = run.claims()
    lines = [line for line in run.metrics(claim.id) if line["kind"] == "train"]
    return sampled(layout, arm, *seen, [line["tokens"] for line in lines], [line["loss"] for line in lines])


def run_other(folder: Path, place: Path, layout: Layout, arm: str) -> Sample:
    """Another framework, under torchrun."""
    tell(folder, place, layout)
    log, steps = place / "log", place / "steps"
    steps.touch()

    def step() -> int:
        return len(steps.read_text().splitlines())

    elastic = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    # As a module: by its path, its folder would come before the standard library, and has an operator.py.
    command = [*elastic, "--module", "tests.bench.frameworks_arm", OTHERS[arm], str(place)]
    with started(command, log, HF_HOME=str(place / "cache")) as process:
        seen = watched(process, step, lambda: log.read_text()[-4000:])
    ranks = [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    passes = [sum(counts) for counts in zip(*(rank["tokens"] for rank in ranks), strict=True)]
    every = layout.global_batch_size // (RANKS * layout.micro_batch_size)
    tokens = [sum(passes[begin : begin + every]) for begin in range(0, len(passes), every)]
    return sampled(layout, arm, *seen, tokens, ranks[0]["losses"])


def sampled(
    layout: Layout, arm: str, first: Mark, last: Mark, peak: float, tokens: list[int], losses: list[float]
) -> Sample:
    """Rates between the marks."""
    assert len(tokens) == len(losses) == STEPS, f"{arm}: {len(tokens)} and {len(losses)} of {STEPS} steps"
    trained = sum(tokens[first.step : last.step])
    return Sample(
        layout=layout.name,
        arm=arm,
        tokens_per_cpu_second=round(trained / (last.cpu - first.cpu), 1),
        tokens_per_second=round(trained / (last.wall - first.wall), 1),
        peak_rss_gib=round(peak, 2),
        tokens=tokens,
        losses=losses,
    )


def of(samples: list[Sample], layout: Layout, arm: str) -> list[Sample]:
    """In order of the rounds."""
    return [sample for sample in samples if (sample.layout, sample.arm) == (layout.name, arm)]


def ratio(samples: list[Sample], layout: Layout, arm: str) -> float:
    """How many times the arm's tokens per CPU second ours trains: the median of the rounds."""
    rounds = zip(of(samples, layout, OURS), of(samples, layout, arm), strict=True)
    return statistics.median(ours.tokens_per_cpu_second / other.tokens_per_cpu_second for ours, other in rounds)


def off(samples: list[Sample], layout: Layout, arm: str) -> float:
    """The largest difference of a step's loss from ours, as a share of it."""
    rounds = zip(of(samples, layout, OURS), of(samples, layout, arm), strict=True)
    pairs = [pair for ours, other in rounds for pair in zip(ours.losses, other.losses, strict=True)]
    return max(abs(theirs / mine - 1) for mine, theirs in pairs)


def goals(samples: list[Sample]) -> dict[str, bool]:
    """Each with its figures, and whether it is met."""
    judged: dict[str, bool] = {}
    for layout in LAYOUTS:
        for arm in (arm for arm in layout.arms if arm in OTHERS):
            found = ratio(samples, layout, arm)
            judged[f"{layout.name}: {found:.3f} x the tokens per CPU second of {arm} (goal {GOAL})"] = found >= GOAL
            if layout.packing:
                continue
            ours, other = (of(samples, layout, one)[0] for one in (OURS, arm))
            judged[f"{layout.name}: the tokens of {arm} in each step"] = ours.tokens == other.tokens
            found = off(samples, layout, arm)
            judged[f"{layout.name}: the losses of {arm}, but for {found:.4%} (at most {SAME_LOSS:.1%})"] = (
                found <= SAME_LOSS
            )
    return judged


def table(samples: list[Sample], layout: Layout) -> str:
    """For the documents."""
    lines = [
        f"{layout.name}, {statistics.mean(of(samples, layout, OURS)[0].tokens):.0f} tokens a step:",
        "",
        f"| Arm | Tokens per CPU-s | Ours / arm | Tokens per s | Peak RSS of a rank | First loss | Mean of the last"
        f" {LAST_LOSSES} | Off from ours |",
        f"|{'---|' * 8}",
    ]
    for arm in layout.arms:
        runs = of(samples, layout, arm)
        rates = [run.tokens_per_cpu_second for run in runs]
        last = statistics.mean(runs[0].losses[-LAST_LOSSES:])
        # Packed, each trains other sequences in a step.
        differs = "" if layout.packing else f"{off(samples, layout, arm):.4%}"
        lines.append(
            f"| {arm} | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
            f" | {ratio(samples, layout, arm):.3f} | {statistics.median(run.tokens_per_second for run in runs):.0f}"
            f" | {statistics.median(run.peak_rss_gib for run in runs):.2f} GiB"
            f" | {runs[0].losses[0]:.4f} | {last:.4f} | {differs} |"
        )
    return "\n".join(lines)


def measure(folder: Path, rounds: int) -> list[Sample]:
    """All layouts and arms, in an order that differs from round to round."""
    samples: list[Sample] = []
    for number in range(rounds):
        for layout in LAYOUTS:
            for arm in random.Random(number).sample(layout.arms, len(layout.arms)):
                place = folder / "run"
                place.mkdir()
                run = run_other if arm in OTHERS else run_ours
                samples.append(run(folder, place, layout, arm))
                shutil.rmtree(place)
                shown = {name: value for name, value in asdict(samples[-1]).items() if name not in ("tokens", "losses")}
                print(f"round {number + 1}: {json.dumps(shown)}", file=sys.stderr, flush=True)
    return samples


def main() -> int:
    """Measure, print the tables, or all as JSON, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", choices=["table", "json"], default="table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        samples = measure(Path(name), options.rounds)
    judged = goals(samples)
    if options.output == "json":
        found = {"load": os.getloadavg()[0], "goals": judged, "samples": [asdict(sample) for sample in samples]}
        print(json.dumps(found, indent=1))
    else:
        print("\n\n".join(table(samples, layout) for layout in LAYOUTS))
        for goal, met in judged.items():
            print(f"{'met   ' if met else 'MISSED'} {goal}")
    return 0 if all(judged.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
