"""How fast files go to S3: our store, Ray Train's way (pyarrow), obstore and s5cmd.

`make bench-upload`, on an idle machine; it puts obstore and s5cmd into a folder of their own. Against a sink with the delay and
the rate per connection that AWS tells (`sink.py`): few big files, and many small ones, the arms in turns. Then once to a real S3
server, whose content is compared byte by byte. Exits 1 if a goal is missed.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.upload_arm import ARMS
from tests.s3_server import REGION, S3Server

ROOT = Path(__file__).parents[2]
EXTRA = ROOT / ".venv" / "bench"
# Files, and MiB of each.
LAYOUTS = {"6 x 245 MiB": (6, 245), "512 x 1 MiB": (512, 1)}
BIG, SMALL = LAYOUTS
GOAL_BIG, GOAL_SMALL, GOAL_BEST, GOAL_CPU = 2.0, 10.0, 0.9, 1.5
DEADLINE = 300.0


def make_files(folder: Path, count: int, mebibytes: int) -> Path:
    """Files that do not compress, and of which no two are equal."""
    folder.mkdir()
    block = random.Random(1).randbytes(1 << 20)
    for number in range(count):
        with (folder / f"file-{number:03}.bin").open("wb") as file:
            for part in range(mebibytes):
                file.write(f"{number:08}{part:08}".encode() + block[16:])
    return folder


@contextmanager
def sink() -> Iterator[str]:
    """Its endpoint."""
    command = [sys.executable, "-m", "tests.bench.sink"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def upload(arm: str, folder: Path, uri: str, endpoint: str, environment: dict[str, str]) -> dict[str, float]:
    """One upload; seconds and CPU seconds."""
    paths = [str(ROOT / part) for part in (".", "operator", "trainer_image")] + [str(EXTRA)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.upload_arm", arm, str(folder), uri, endpoint],
        env=os.environ
        | environment
        | {"PYTHONPATH": os.pathsep.join(paths), "S5CMD": str(EXTRA / "s5cmd" / "bin" / "s5cmd")},
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, f"{arm}: exit code {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def measure(folders: dict[str, Path], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """MB/s and CPU seconds per GB, by layout and arm: medians."""
    samples: dict[str, dict[str, list[dict[str, float]]]] = {layout: {arm: [] for arm in ARMS} for layout in LAYOUTS}
    keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret", "AWS_REGION": REGION}
    with sink() as endpoint:
        for number in range(rounds):
            for layout, folder in folders.items():
                for arm in random.Random(number).sample(sorted(ARMS), len(ARMS)):
                    samples[layout][arm].append(upload(arm, folder, "s3://bucket/prefix", endpoint, keys))
                    print(f"round {number + 1}: {layout}: {arm}: {samples[layout][arm][-1]}", file=sys.stderr)
    return {
        layout: {arm: _medians(values, _megabytes(layout)) for arm, values in arms.items()}
        for layout, arms in samples.items()
    }


def _megabytes(layout: str) -> float:
    count, mebibytes = LAYOUTS[layout]
    return count * mebibytes * (1 << 20) / 1e6


def _medians(samples: list[dict[str, float]], megabytes: float) -> dict[str, float]:
    rates = [megabytes / sample["seconds"] for sample in samples]
    return {
        "rate": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "cpu": statistics.median(sample["cpu"] for sample in samples) / megabytes * 1000,
    }


def differing(folders: dict[str, Path], scratch: Path) -> list[str]:
    """What our store brought to a real server with other bytes, or not at all: by SHA-256 of what a plain client reads."""
    server = S3Server.start(scratch / "s3")
    try:
        bucket = server.make_bucket("upload").removeprefix("s3://")
        wrong = []
        for layout, folder in folders.items():
            name = folder.name
            upload("ours", folder, f"s3://{bucket}/{name}", server.endpoint, server.env())
            for path in folder.iterdir():
                stored = server.client().get_object(Bucket=bucket, Key=f"{name}/c/{path.name}")["Body"]
                if hashlib.sha256(stored.read()).digest() != hashlib.sha256(path.read_bytes()).digest():
                    wrong.append(f"{layout}: {path.name}")
        return wrong
    finally:
        server.stop()


def goals(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, bool]:
    """Each goal, with its figures, and whether it is met."""
    judged = {}
    for layout, factor in ((BIG, GOAL_BIG), (SMALL, GOAL_SMALL)):
        rates = {arm: values["rate"] for arm, values in found[layout].items()}
        ratio = rates["ours"] / rates["pyarrow"]
        judged[f"{layout}: {ratio:.1f} x pyarrow (goal {factor:.0f})"] = ratio >= factor
        best = max(rates["obstore"], rates["s5cmd"])
        judged[f"{layout}: {rates['ours'] / best:.2f} x the best of the others (goal {GOAL_BEST})"] = (
            rates["ours"] >= GOAL_BEST * best
        )
    cpu = found[BIG]["ours"]["cpu"]
    judged[f"{BIG}: {cpu:.1f} CPU-s per GB (goal {GOAL_CPU})"] = cpu <= GOAL_CPU
    return judged


def table(found: dict[str, Any]) -> str:
    """As text."""
    rows = [f"| Client | {' | '.join(f'{layout}, MB/s | CPU-s per GB' for layout in found)} |", "|---|---|---|---|---|"]
    for arm in ARMS:
        cells = [
            f"{values['rate']:.0f} ({values['slowest']:.0f} to {values['fastest']:.0f}) | {values['cpu']:.1f}"
            for values in (found[layout][arm] for layout in found)
        ]
        rows.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> int:
    """Measure, compare, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    # In memory: a disk would be the limit.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        scratch = Path(name)
        folders = {
            layout: make_files(scratch / f"files-{count}", count, mebibytes)
            for layout, (count, mebibytes) in LAYOUTS.items()
        }
        found = measure(folders, options.rounds)
        wrong = differing(folders, scratch)
    judged = goals(found)
    print(table(found))
    for goal, met in judged.items():
        print(f"{goal}: {'met' if met else 'MISSED'}")
    print(f"bytes on a real S3 server: {f'DIFFERENT: {wrong}' if wrong else 'equal'}; load {os.getloadavg()[0]:.1f}")
    return 0 if all(judged.values()) and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
