"""What a checkpoint costs training: how long the loop stands still, and how much longer the steps after it take.

`python -m tests.bench.checkpoint [--rounds N] [--storage file|s3] [--output json]`, on an idle machine. Two ranks, ZeRO-3, at
least 500 MB of state each. Three arms take turns in one run: ours; the synchronous way of the reference example
(`save_checkpoint` into a temporary folder, a barrier, and the upload that `ray.train.report` does); and the floor, a plain copy
of the same tensors. The slowest rank counts. Exits 1 if a goal is missed: blocked at least 20 times shorter than the
synchronous way, and at most 1.5 x the copy + 150 ms.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.s3_server import S3Server

ROOT = Path(__file__).parents[2]
RANKS = 2
STEPS_BEFORE, STEPS_AFTER = 3, 2
GOAL_RATIO, GOAL_FACTOR, GOAL_ALLOWANCE = 20.0, 1.5, 0.150
DEADLINE = 1800.0


@contextmanager
def storage(kind: str, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A place to save to, and the environment that leads there."""
    if kind == "file":
        yield (folder / "storage").as_uri(), {}
        return
    server = S3Server.start(folder / "s3")
    try:
        yield server.make_bucket("checkpoints"), server.env()
    finally:
        server.stop()


def main() -> int:
    """Start the ranks, print the table, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--storage", choices=["file", "s3"], default="file")
    parser.add_argument("--output", choices=["table", "json"], default="table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, storage(options.storage, Path(name)) as (uri, environment):
        out = Path(name) / "samples.json"
        elastic = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
        subprocess.run(
            [*elastic, "-m", "tests.bench.checkpoint_ranks", uri, name, str(out), str(options.rounds)],
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "operator", "trainer_image")),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            }
            | environment,
            cwd=ROOT,
            check=True,
            timeout=DEADLINE,
            stdout=sys.stderr,
        )
        samples: list[dict[str, Any]] = json.loads(out.read_text())
    result = summary(samples) | {"storage": options.storage, "load": os.getloadavg()[0]}
    print(json.dumps(result | {"samples": samples}, indent=1) if options.output == "json" else table(result))
    return 0 if result["met"] else 1


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, with the range, and whether the goals are met."""

    def of(field: str) -> dict[str, float]:
        values = [sample[field] for sample in samples]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    fields = (
        *("step", "memcpy", "ours_blocked", "ours_excess", "ours_cpu", "ours_committed_after"),
        *("sync_blocked", "sync_excess", "sync_cpu"),
    )
    result: dict[str, Any] = {field: of(field) for field in fields}
    ratio = result["sync_blocked"]["median"] / result["ours_blocked"]["median"]
    bound = GOAL_FACTOR * result["memcpy"]["median"] + GOAL_ALLOWANCE
    return result | {
        "megabytes_per_rank": samples[0]["bytes"] / 1e6,
        "ratio": ratio,
        "bound": bound,
        "met": ratio >= GOAL_RATIO and result["ours_blocked"]["median"] <= bound,
    }


def table(result: dict[str, Any]) -> str:
    """The summary as text."""

    def row(name: str, *fields: str | None) -> str:
        def cell(field: str | None) -> str:
            if field is None:
                return "-"
            values = result[field]
            return f"{values['median']:.3f} s ({values['min']:.3f} to {values['max']:.3f})"

        return f"| {name} | {' | '.join(cell(field) for field in fields)} |"

    return "\n".join(
        [
            f"{result['megabytes_per_rank']:.0f} MB per rank, {RANKS} ranks, {result['storage']} storage; "
            f"step {result['step']['median']:.2f} s ({result['step']['min']:.2f} to {result['step']['max']:.2f}); "
            f"load {result['load']:.1f}",
            "| Arm | Blocked | Excess of the next steps | CPU of all ranks |",
            "|---|---|---|---|",
            row("memcpy (floor)", "memcpy", None, None),
            row("ours", "ours_blocked", "ours_excess", "ours_cpu"),
            row("synchronous", "sync_blocked", "sync_excess", "sync_cpu"),
            f"ours is committed {result['ours_committed_after']['median']:.1f} s after it began",
            f"synchronous / ours: {result['ratio']:.0f} x (goal {GOAL_RATIO:.0f}); "
            f"ours at most {result['bound']:.3f} s: {'met' if result['met'] else 'MISSED'}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
