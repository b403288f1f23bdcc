"""Attempts of a run on different numbers of ranks, one after another under torchrun, in a process that imports once.

Started with a folder that has the manifest, as `Run` wrote it, and the numbers of ranks: `FOLDER 2 1 3 .2` stops each attempt
after its first step, but lets one with a dot go on to the end. Other folders and numbers may follow.
"""

import sys
from pathlib import Path

from dsft_api.job import Ranks
from dsft_api.manifest import parse
from dsft_cli.local_run import find_run, job_for
from dsft_trainer.driver import first_come
from dsft_trainer.runtime import Outcome
from dsft_trainer.runtime.channel import Channel
from dsft_trainer.runtime.torchrun import launch


def main(arguments: list[str]) -> None:
    """Do them in their order."""
    folder = Path()
    for leg in arguments:
        if "/" in leg:
            folder = Path(leg)
            continue
        manifest = folder / "manifest.yaml"
        run = find_run(parse(manifest.read_text(), str(manifest)), folder / "runs")
        job = job_for(run, Ranks(count=int(leg.removeprefix(".")), device="cpu", threads=1), str(manifest))
        job = first_come(job)
        channel = Channel(folder / f"channel-{job.attempt}")
        channel.reset()
        if not leg.startswith("."):
            channel.request_drain()
        outcome = launch(job, channel)
        assert outcome is (Outcome.SUCCEEDED if leg.startswith(".") else Outcome.INTERRUPTED), outcome


if __name__ == "__main__":
    main(sys.argv[1:])
