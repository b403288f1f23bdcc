"""How fast ranks are to one another: measured by two real ones, told, and held against what the run asks for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from tests.trainer.runs import causal_lm, first_attempt

pytestmark = pytest.mark.slow

# What a rank does: it measures, and writes what it told and what it raised.
RANK = """
import json, sys
import torch, torch.distributed as dist
from dsft_api.job import Job
from dsft_trainer.errors import TrainerError
from dsft_trainer.interconnect import check_interconnect
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
class Told:
    def update(self, **changes):
        self.told = changes["interconnect"].to_wire()
out = {}
for name in ("modest", "greedy", "silent"):
    job, told = Job.model_validate_json(open(f"{folder}/{name}.json").read()), Told()
    try:
        check_interconnect(job, torch.device("cpu"), told)
    except TrainerError as error:
        out[f"{name} raised"] = [error.failure_class, error.message]
    out[name] = getattr(told, "told", None)
print(json.dumps(out))
"""


def job(floor: float | None) -> str:
    document = causal_lm("tiny", Path("/model"), Path("/text.jsonl"), steps=1)["spec"]
    if floor is not None:
        document["execution"]["interconnect"] = {"minAllGatherGBps": floor}
    return first_attempt(document, ranks=2).to_json()


def test_two_ranks_measure_the_same_and_refuse_together(tmp_path: Path) -> None:
    for name, floor in (("modest", 1e-6), ("greedy", 1e6), ("silent", None)):
        (tmp_path / f"{name}.json").write_text(job(floor))
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    one, other = (json.loads(rank.communicate(timeout=240)[0]) for rank in ranks)
    assert one == other, "a rank that decides alone leaves its peers waiting"
    rate = one["modest"]["allGatherGBps"]
    assert 0.01 < rate < 1000
    assert one["modest"]["ranks"] == 2
    assert "modest raised" not in one
    kind, message = one["greedy raised"]
    assert kind == FailureClass.SLOW_INTERCONNECT
    assert "asks for 1e+06" in message
    assert one["greedy"] is not None, "the rate is told also where it is too low"
    assert one["silent"] is None, "on CPUs it is measured only where somebody asks"
