"""A rank that goes because memory ran out, by Ray's monitor or by the kernel, and what the driver makes of it.

The worker node sees a memory cgroup of ours instead of its own: files that say what the kernel would.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsft_api.conditions import ExitCode, FailureClass
from dsft_api.progress import TrainerPhase
from tests.trainer import tiny
from tests.trainer.ray_nodes import Attempt, RayNodes, attempt, resource
from tests.trainer.runs import Manifest, causal_lm, is_alive, is_rank_of_ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LIMIT = 8_000_000_000
CGROUP = "/sys/fs/cgroup"


@dataclass(frozen=True)
class Memory:
    """A container's memory cgroup, as cgroup v1 and v2 spell it."""

    folder: Path

    def say(self, *, used: int, killed: int) -> None:
        (self.folder / "memory").mkdir(parents=True, exist_ok=True)
        stat = f"inactive_file 0\nactive_file 0\ntotal_inactive_file 0\ntotal_active_file 0\nrss {used}\ncache 0\n"
        files = {
            "memory/memory.limit_in_bytes": str(LIMIT),
            "memory/memory.usage_in_bytes": str(used),
            "memory/memory.stat": stat,
            "memory/memory.oom_control": f"oom_kill_disable 0\nunder_oom 0\noom_kill {killed}\n",
        }
        for name, text in files.items():
            (self.folder / name).write_text(text)

    def in_place(self) -> list[str]:
        """A command's beginning: what follows sees this cgroup."""
        script = f'mount --bind {self.folder} {CGROUP} && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", script, "sh"]


def may_mount() -> bool:
    """Only root may."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Memory:
    if not may_mount():
        pytest.skip("a memory cgroup of our own needs root and mount namespaces")
    memory = Memory(tmp_path_factory.mktemp("cgroup"))
    memory.say(used=LIMIT // 8, killed=0)
    return memory


@pytest.fixture(scope="module")
def nodes(memory: Memory) -> Iterator[RayNodes]:
    nodes = RayNodes.start(workers=0)
    nodes.add_worker("tight", before=memory.in_place())
    yield nodes
    nodes.stop()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("assets")
    document = causal_lm("tiny", tiny.llama(folder / "model"), tiny.dataset(folder, "text"), steps=20_000)
    document["spec"]["nodePools"] = [{"name": "cpu", "nodes": 1, "resources": {"requests": {"cpu": 1}}}]
    # None before its end.
    document["spec"]["checkpoint"] = {"everySteps": 20_000}
    return document


@pytest.fixture
def running(nodes: RayNodes, manifest: Manifest, tmp_path: Path) -> Attempt:
    """An attempt that trains."""
    begun = attempt(nodes, resource(manifest, tmp_path.as_uri()), 1).post()
    begun.until(lambda attempt: attempt.step() > 0, "a step was told of")
    return begun


def test_the_kernel_killed_it(running: Attempt, nodes: RayNodes, memory: Memory) -> None:
    memory.say(used=LIMIT // 8, killed=1)
    kill_rank(nodes)
    assert_out_of_memory(running, "the kernel killed 1 process(es)")


def test_rays_monitor_killed_it(running: Attempt, memory: Memory) -> None:
    memory.say(used=LIMIT - 1, killed=1)
    assert_out_of_memory(running, "killed due to the node running low on memory")
    memory.say(used=LIMIT // 8, killed=1)


@pytest.mark.drill
def test_somebody_else_killed_it(running: Attempt, nodes: RayNodes, memory: Memory) -> None:
    """What the kernel and Ray killed before is not taken for the cause again. Without a commit, one more start is the last."""
    kill_rank(nodes)
    running.until(lambda attempt: told_of_group(attempt, 2), "the ranks trained again")
    kill_rank(nodes)
    seen = running.ended()
    assert (seen.state, seen.exit_code) == ("FAILED", ExitCode.OTHER), running.driver_log()
    told = running.own()
    assert told is not None
    assert told.failure is not None
    assert told.failure.failure_class is FailureClass.WORKER_LOST
    assert (told.group, told.restarts) == (2, 1)
    assert [loss.failure_class for loss in told.losses] == [FailureClass.WORKER_LOST]


def told_of_group(attempt: Attempt, group: int) -> bool:
    own = attempt.own()
    return own is not None and own.group == group and own.phase is TrainerPhase.TRAINING


def kill_rank(nodes: RayNodes) -> None:
    (rank,) = [process for process in nodes.members("tight") if is_alive(process) and is_rank_of_ray(process)]
    rank.kill()


def assert_out_of_memory(running: Attempt, words: str) -> None:
    seen = running.ended()
    assert (seen.state, seen.exit_code) == ("FAILED", ExitCode.OUT_OF_MEMORY), running.driver_log()
    told = running.own()
    assert told is not None
    assert told.failure is not None
    assert told.failure.failure_class is FailureClass.HOST_OOM
    assert words in told.failure.message
