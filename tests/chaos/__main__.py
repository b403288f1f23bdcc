"""Random kills of real runs: nothing that was committed is lost, and nothing is trained differently.

`python -m tests.chaos [--kills N] [--seed S]`. Real `dsft run` processes on Ray and under torchrun, two ranks on CPU with
dropout, checkpoints on a real S3 server behind a proxy that holds up, loses and delays requests. A run is killed as often as its
steps allow, finished, and held against one that nobody killed; then the next one begins. A line per kill, a table, and exit code
1 if anything was wrong; then the folder with all logs stays.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from tests.chaos.deck import Card, deck
from tests.chaos.siege import FINISH_SECONDS, Blow, Siege
from tests.s3_faults import faulty
from tests.s3_server import REGION, S3Server
from tests.trainer.killing import killed_manifest, never_killed
from tests.trainer.runs import Manifest, Run

STEPS = 160


def main() -> int:
    """Kill, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dsft-chaos-"))
    print(f"{options.kills} kills, seed {options.seed}; logs in {folder}", flush=True)
    begin = time.monotonic()
    manifest = killed_manifest(folder, STEPS)
    reference = never_killed(manifest, folder / "reference", FINISH_SECONDS)
    blows, wrong = besiege(deck(options.kills, options.seed), manifest, reference, folder)
    print(table(blows))
    print(
        f"seed {options.seed}: {len(blows)} of {options.kills} kills in {time.monotonic() - begin:.0f} s, load "
        f"{os.getloadavg()[0]:.1f}; {wrong} wrong"
    )
    if wrong or len(blows) < options.kills:
        return 1
    shutil.rmtree(folder)
    return 0


def besiege(cards: list[Card], manifest: Manifest, reference: Run, folder: Path) -> tuple[list[Blow], int]:
    """Deal out all cards, over as many runs as it takes; what they did, and how many went wrong."""
    blows: list[Blow] = []
    wrong = number = 0
    server = S3Server.start(folder / "s3")
    os.environ.update(server.env())
    bucket = server.make_bucket("chaos")
    try:
        while cards:
            number += 1
            with faulty(server.endpoint) as proxy:
                storage = {"uri": f"{bucket}/{number}", "endpointUrl": proxy.endpoint, "region": REGION}
                document = {**manifest, "spec": {**manifest["spec"], "storage": storage}}
                siege = Siege(Run(document, folder / f"run-{number}"), proxy, server, reference)
                try:
                    while cards and siege.has_room:
                        card = cards.pop(0)
                        blows.append(siege.strike(card))
                        print(line(len(blows), blows[-1]), flush=True)
                    siege.finish()
                    print(f"run {number}: {summary(siege)}", flush=True)
                except Exception:  # noqa: BLE001  told, counted, and the next run begins
                    wrong += 1
                    print(f"WRONG in run {number}: {traceback.format_exc()}", flush=True)
                finally:
                    siege.close()
    finally:
        server.stop()
    return blows, wrong


def line(number: int, blow: Blow) -> str:
    """One kill."""
    healed = ", healed inside the attempt" if blow.healed else ""
    return (
        f"{number:3}  {blow.runtime:8}  {blow.card!s:55}  step {blow.at_step:3}, on from {blow.base_step:3}, "
        f"{blow.torn} torn, {blow.seconds:5.1f} s{healed}"
    )


def summary(siege: Siege) -> str:
    """A run that was finished."""
    claims = siege.run.claims()
    return (
        f"{len(claims)} starts in {claims[-1].id.attempt} attempts, {len(siege.ledger.seen)} commits seen; losses, gradient "
        "norms, evaluations and weights are those of the run that nobody killed"
    )


def table(blows: list[Blow]) -> str:
    """By kind and runtime."""
    rows = ["| Kill | Runtime | Kills | Healed inside | Torn checkpoints | Steps redone | Seconds to the next step |"]
    rows.append("|---|---|---|---|---|---|---|")
    for kind, runtime in sorted({(blow.card.kind, blow.runtime) for blow in blows}):
        rows.append(_row(kind, runtime, (b for b in blows if (b.card.kind, b.runtime) == (kind, runtime))))
    return "\n".join([*rows, _row("all", "", blows)])


def _row(kind: str, runtime: str, blows: Iterable[Blow]) -> str:
    chosen = list(blows)
    seconds = [blow.seconds for blow in chosen]
    cells = (
        kind,
        runtime,
        len(chosen),
        sum(blow.healed for blow in chosen),
        sum(blow.torn for blow in chosen),
        sum(blow.redone for blow in chosen),
        f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})" if seconds else "",
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
