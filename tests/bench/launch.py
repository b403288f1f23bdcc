"""How far dsft on Ray is from its floor, bare torchrun + DeepSpeed: time to the first step, and CPU per step after it.

`python -m tests.bench.launch [ROUNDS]`, on an idle machine. The arms take turns, so that a noisy neighbour hits all of them; CPU
seconds of the whole process tree are compared rather than wall time. Shims on PATH show that no compiler runs. Exits 1 if a
goal is missed: first step within 2 x torchrun + 8 s, at most 1.05 x its CPU per step, no compiler.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
import yaml

from dsft_api.batch import plan_batch
from dsft_api.job import Ranks
from dsft_api.manifest import parse
from dsft_cli.local_run import find_run, job_for
from dsft_trainer.data.collate import Collator
from dsft_trainer.data.prepare import open_prepared, tokenize_here
from dsft_trainer.data.sampler import GlobalBatches, split
from dsft_trainer.data.sources import fetch
from dsft_trainer.engine import deepspeed_config
from dsft_trainer.model import load_tokenizer

ROOT = Path(__file__).parents[2]
RANKS = 2
FIRST, LAST = 6, 26  # CPU is counted between these steps
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "clang++", "nvcc", "ninja")
DEADLINE = 300.0


@dataclass(frozen=True)
class Sample:
    """One run of one arm; seconds."""

    arm: str
    phases: dict[str, float]
    first_step: float
    cpu_per_step: float
    wall_per_step: float
    peak_rss_gib: float
    compilers: list[str]


def manifest(folder: Path) -> Path:
    """The quickstart without evaluation and checkpoints: training alone. In bf16, as larger models are trained."""
    document = yaml.safe_load((ROOT / "examples/quickstart.yaml").read_text())
    spec = document["spec"]
    del spec["evaluation"], spec["data"]["eval"]
    spec["training"] |= {"maxSteps": LAST + 4, "precision": "bf16"}
    spec["checkpoint"] = {"everySteps": 1000}
    spec["export"] = {"format": "none"}
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def dump_batches(path: Path, folder: Path) -> None:
    """What `bare.py` needs: the same batches in the same order, the same DeepSpeed configuration."""
    resource = parse(path.read_text(), str(path))
    ranks = Ranks(count=RANKS, device="cpu", threads=max(1, (os.cpu_count() or 1) // RANKS))
    job = job_for(find_run(resource, folder / "runs"), ranks, str(path))
    work = job.spec.workload()
    model = fetch(work.model.uri, storage=job.spec.storage, cache=folder, kind="model")
    tokenizer = load_tokenizer(model)
    rows = open_prepared(tokenize_here(job, tokenizer, folder / "tokens")).train
    batches = GlobalBatches(len(rows), work.training.global_batch_size, work.training.seed)
    collate = Collator(tokenizer.pad_token_id, work.model.task, work.data.max_length)
    micro = job.spec.execution.micro_batch_size
    for rank in range(RANKS):
        made = []
        for step in range(LAST + 4):
            (share,) = split(batches.batch(step), rank, RANKS, micro)
            batch = collate([rows[int(row)] for row in share])
            made.append((dict(batch.inputs), batch.labels))
        torch.save(made, folder / f"rank-{rank}.pt")
    plan = plan_batch(work.training.global_batch_size, RANKS, micro)
    (folder / "config.json").write_text(json.dumps(deepspeed_config(job.spec, plan)))
    (folder / "model").write_text(str(model))


@contextmanager
def compiler_traps(folder: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """An environment in which each compiler leaves a line in a file instead of compiling."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = folder / "seen"
    seen.write_text("")
    for name in COMPILERS:
        trap = folder / name
        trap.write_text(f'#!/bin/sh\necho "{name} $*" >> {seen}\nexit 1\n')
        trap.chmod(0o755)
    yield {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}, seen


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(pid: int) -> float:
    """User and system time of a process tree so far."""
    total = 0.0
    for process in tree(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def peak_rss(pid: int) -> float:
    """The largest resident set of a process in the tree, GiB."""
    sizes = [0]
    for process in tree(pid):
        try:
            sizes.append(process.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return max(sizes) / 2**30


@dataclass
class Watch:
    """What is noticed while an arm runs. `look` tells its phase and the last step it finished."""

    look: Callable[[], tuple[str, int]]
    phases: dict[str, float] = field(default_factory=dict)
    marks: dict[int, tuple[int, float, float]] = field(default_factory=dict)  # wanted step: real step, CPU, wall
    rss: float = 0.0

    def notice(self, pid: int, now: float) -> None:
        phase, step = self.look()
        self.phases.setdefault(phase, round(now, 1))
        if step < 1:
            return
        self.phases.setdefault("first step", round(now, 1))
        self.rss = max(self.rss, peak_rss(pid))
        for wanted in (FIRST, LAST):
            if step >= wanted and wanted not in self.marks:
                self.marks[wanted] = (step, cpu_seconds(pid), now)

    def per_step(self, which: int) -> float:
        """CPU (1) or wall (2) seconds per step between the marks."""
        first, last = self.marks[FIRST], self.marks[LAST]
        return (last[which] - first[which]) / (last[0] - first[0])


def measure(arm: str, argv: list[str], environment: dict[str, str], seen: Path, watch: Watch) -> Sample:
    """Run one arm to its end."""
    begin = time.monotonic()
    seen.write_text("")
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            while process.poll() is None and time.monotonic() - begin < DEADLINE:
                watch.notice(process.pid, time.monotonic() - begin)
                time.sleep(0.02)
            code = process.wait(timeout=60)
        finally:
            for child in tree(process.pid):
                child.kill()
        if code != 0 or LAST not in watch.marks:
            log.seek(0)
            raise SystemExit(f"{arm} ended with {code}:\n{log.read().decode(errors='replace')[-4000:]}")
    return Sample(
        arm=arm,
        phases=watch.phases,
        first_step=watch.phases["first step"],
        cpu_per_step=watch.per_step(1),
        wall_per_step=watch.per_step(2),
        peak_rss_gib=round(watch.rss, 2),
        compilers=seen.read_text().splitlines(),
    )


def run_bare(folder: Path, environment: dict[str, str], seen: Path) -> Sample:
    """Bare torchrun + DeepSpeed."""
    out = folder / "bare.log"
    out.write_text("")
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {RANKS}"
    # As a module: by its path, its folder would come before the standard library, and has an operator.py.
    script = f"exec {torchrun} --module tests.bench.bare {folder} > {out}"
    threads = max(1, (os.cpu_count() or 1) // RANKS)

    def look() -> tuple[str, int]:
        steps = [line for line in out.read_text().splitlines() if line.startswith("step ")]
        return "started", int(steps[-1].split()[1]) if steps else 0

    environment = {**environment, "OMP_NUM_THREADS": str(threads)}
    return measure("bare torchrun", ["/bin/sh", "-c", script], environment, seen, Watch(look))


def run_dsft(arm: str, path: Path, folder: Path, environment: dict[str, str], seen: Path) -> Sample:
    """`dsft run` on the named runtime."""
    runs = Path(tempfile.mkdtemp(dir=folder))

    def look() -> tuple[str, int]:
        for document in runs.glob("*/*/channel/dsft-progress.json"):
            progress = json.loads(document.read_text())
            return progress["phase"], progress.get("progress", {}).get("step", 0)
        return "command", 0

    dsft = str(Path(sys.executable).with_name("dsft"))
    argv = [dsft, "run", "-f", str(path), "--runtime", arm]
    return measure(f"dsft {arm}", argv, {**environment, "DSFT_RUNS": str(runs)}, seen, Watch(look))


def main() -> int:
    """Run the rounds, print the table, judge."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as name, compiler_traps(Path(name) / "traps") as (environment, seen):
        folder = Path(name)
        path = manifest(folder)
        dump_batches(path, folder)
        for number in range(rounds):
            for sample in (
                run_bare(folder, environment, seen),
                run_dsft("ray", path, folder, environment, seen),
                run_dsft("torchrun", path, folder, environment, seen),
            ):
                samples.append(sample)
                print(f"round {number + 1}: {json.dumps(asdict(sample))}", flush=True)
    return judge(samples)


def judge(samples: list[Sample]) -> int:
    """Print medians and ratios; 1 if a goal is missed."""

    def median(arm: str, field: str) -> float:
        return statistics.median(getattr(sample, field) for sample in samples if sample.arm == arm)

    floor_start, floor_cpu = median("bare torchrun", "first_step"), median("bare torchrun", "cpu_per_step")
    for arm in dict.fromkeys(sample.arm for sample in samples):
        print(
            f"{arm:<14} first step {median(arm, 'first_step'):5.1f} s   CPU/step {median(arm, 'cpu_per_step'):.3f} s"
            f" ({median(arm, 'cpu_per_step') / floor_cpu:.3f} x)   wall/step {median(arm, 'wall_per_step'):.3f} s"
            f"   peak RSS {median(arm, 'peak_rss_gib'):.2f} GiB"
        )
    goals = {
        f"first step {median('dsft ray', 'first_step'):.1f} s <= 2 x {floor_start:.1f} + 8 s": median(
            "dsft ray", "first_step"
        )
        <= 2 * floor_start + 8,
        "CPU per step at most 1.05 x bare torchrun": median("dsft ray", "cpu_per_step") <= 1.05 * floor_cpu,
        "no compiler ran": not any(sample.compilers for sample in samples if sample.arm != "bare torchrun"),
    }
    for goal, met in goals.items():
        print(f"{'met   ' if met else 'MISSED'} {goal}")
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
