"""The way of a run on a cluster, less Kubernetes: head and workers as nodes of their own, token auth, the operator's adapter."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsft_api.conditions import ExitCode, FailureClass
from dsft_api.layout import EXPORT, RESULT_FILE, attempt_logs
from dsft_api.progress import Progress, TrainerPhase
from dsft_operator.core.observed import Run
from dsft_trainer.checkpoint.listing import read_claims, read_commits
from dsft_trainer.checkpoint.store import open_store
from tests.s3_server import S3Server
from tests.trainer import tiny
from tests.trainer.archives import archive, pinned
from tests.trainer.ray_nodes import Attempt, RayNodes, attempt, prefix, resource
from tests.trainer.runs import Manifest, causal_lm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 30
# Long enough to be stopped, and short enough to be finished.
LONG = 150
# It never gets there.
ENDLESS = 20_000


PROGRAM = """
import pathlib
import tempfile
import ray.train

def train(config):
    for step in range(1, config["steps"] + 1):
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "step").write_text(str(step))
            first = ray.train.get_context().get_world_rank() == 0
            checkpoint = ray.train.Checkpoint.from_directory(folder) if first else None
            ray.train.report({"step": step, "total_steps": config["steps"]}, checkpoint=checkpoint)
"""


@pytest.fixture(scope="module")
def nodes(s3_server: S3Server) -> Iterator[RayNodes]:
    nodes = RayNodes.start(env=s3_server.env())
    yield nodes
    nodes.stop()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("assets")
    document = causal_lm("tiny", tiny.llama(folder / "model"), tiny.dataset(folder, "text"), steps=STEPS)
    document["spec"]["nodePools"] = [{"name": "cpu", "nodes": 2, "resources": {"requests": {"cpu": 1}}}]
    document["spec"]["checkpoint"] = {"everySteps": 10, "drainSeconds": 60}
    return document


def longer(manifest: Manifest, steps: int, commit_every: int = 5000) -> Manifest:
    """The same training, so long."""
    training = {**manifest["spec"]["training"], "maxSteps": steps}
    return {
        **manifest,
        "spec": {
            **manifest["spec"],
            "training": training,
            "checkpoint": {"everySteps": commit_every, "drainSeconds": 60},
        },
    }


def commits(run: Run) -> list[int]:
    """Steps of the committed checkpoints."""
    return [commit.step for commit in read_commits(open_store(prefix(run)))]


def test_a_run_succeeds_on_s3_and_is_followed_through_the_operators_adapter(
    nodes: RayNodes, manifest: Manifest, s3_uri: str
) -> None:
    run = resource(manifest, s3_uri)
    first = attempt(nodes, run, 1).post()
    first.post()  # a second submission of the same id is success, and starts nothing
    first.until(lambda attempt: attempt.step() > 0, "a step was told of")
    seen = first.ended()

    assert (seen.state, seen.exit_code) == ("SUCCEEDED", ExitCode.OK), first.driver_log()
    told = first.own()
    assert told is not None
    assert (told.run_uid, told.phase) == (run.uid, TrainerPhase.SUCCEEDED)
    assert told.progress is not None
    assert (told.progress.step, told.progress.total_steps) == (STEPS, STEPS)
    assert commits(run) == [20, 30]
    assert told.checkpoints is not None
    assert told.checkpoints.latest is not None
    assert told.checkpoints.latest.uri == f"{prefix(run)}/checkpoints/step-00000030-a1.g1"
    assert told.output is not None
    assert told.output.uri == f"{prefix(run)}/{EXPORT}"
    stored = open_store(prefix(run)).get_bytes(RESULT_FILE)
    assert stored is not None
    assert Progress.model_validate_json(stored).output == told.output
    logs = {name: stored_log(run, name) for name in ("driver", "rank-0", "rank-1")}
    assert "a1.g1 starts from the beginning" in logs["driver"]
    assert all("a1.g1 starts from the beginning" in text for text in logs.values())
    assert "a1.g1 starts from the beginning" in nodes.log("head"), "the head's own output lacks what the driver printed"


def test_a_lost_node_is_waited_for_inside_the_attempt(nodes: RayNodes, manifest: Manifest, tmp_path: Path) -> None:
    run = resource(longer(manifest, ENDLESS, commit_every=50), tmp_path.as_uri())
    only = attempt(nodes, run, 1).post()
    only.until(lambda _: commits(run) != [], "a commit")
    nodes.kill("worker-1")
    only.until(lambda attempt: "waiting for nodes: 1 of 2 CPUs are missing" in message(attempt), "the wait was told")
    nodes.add_worker("worker-1")
    only.until(lambda _: any(claim.base_step for claim in read_claims(open_store(prefix(run)))), "another start")
    only.until(lambda attempt: attempt.phase() is TrainerPhase.TRAINING, "a step was told of")
    only.stop()
    assert only.ended().state == "STOPPED", only.driver_log()
    told = only.own()
    assert told is not None
    assert (told.phase, told.restarts, told.group) == (TrainerPhase.INTERRUPTED, 1, 2), only.driver_log()
    assert [loss.failure_class for loss in told.losses] == [FailureClass.WORKER_LOST]
    assert [claim.base_step > 0 for claim in read_claims(open_store(prefix(run)))] == [False, True]
    assert "a1.g2 starts from step-" in stored_log(run, "rank-0-start-2")


def message(attempt: Attempt) -> str:
    own = attempt.own()
    return own.message or "" if own is not None else ""


@pytest.mark.drill
def test_stop_commits_and_the_next_attempt_goes_on_from_there(
    nodes: RayNodes, manifest: Manifest, tmp_path: Path
) -> None:
    run = resource(longer(manifest, LONG), tmp_path.as_uri())
    first = attempt(nodes, run, 1).post()
    first.until(lambda attempt: attempt.step() > 0, "a step was told of")
    first.stop()
    seen = first.ended()

    assert (seen.state, seen.exit_code) == ("STOPPED", None), first.driver_log()
    told = first.own()
    assert told is not None
    assert told.phase is TrainerPhase.INTERRUPTED, first.driver_log()
    assert told.checkpoints is not None
    assert told.checkpoints.latest is not None
    (step,) = commits(run)
    assert told.checkpoints.latest.step == step > 0

    # What the first attempt told is still there, and is not taken for the second's.
    second = attempt(nodes, run, 2)
    assert isinstance(second.told(), Progress)
    assert second.own() is None
    second.post()
    assert second.ended().state == "SUCCEEDED", second.driver_log()
    told = second.own()
    assert told is not None
    assert (told.from_step, told.phase) == (step, TrainerPhase.SUCCEEDED)
    assert [claim.base_step for claim in read_claims(open_store(prefix(run)))] == [0, step]


def test_drain_from_a_worker_commits_and_waits_for_it(nodes: RayNodes, manifest: Manifest, tmp_path: Path) -> None:
    run = resource(longer(manifest, ENDLESS), tmp_path.as_uri())
    running = attempt(nodes, run, 1).post()
    running.until(lambda attempt: attempt.step() > 0, "a step was told of")
    drained = drain(nodes, "worker-0")

    assert drained.returncode == 0, drained.stdout
    assert len(commits(run)) == 1, f"drain came back before the commit:\n{drained.stdout}\n{running.driver_log()}"
    seen = running.ended()
    assert (seen.state, seen.exit_code) == ("FAILED", ExitCode.INTERRUPTED), running.driver_log()
    told = running.own()
    assert told is not None
    assert told.phase is TrainerPhase.INTERRUPTED


@pytest.mark.drill
def test_a_node_that_ray_is_about_to_lose_is_left_with_a_commit(manifest: Manifest, tmp_path: Path) -> None:
    own = RayNodes.start()
    try:
        run = resource(longer(manifest, ENDLESS), tmp_path.as_uri())
        running = attempt(own, run, 1).post()
        running.until(lambda attempt: attempt.step() > 0, "a step was told of")
        announce_the_end_of_a_worker(own)
        seen = running.ended()
        assert (seen.state, seen.exit_code) == ("FAILED", ExitCode.INTERRUPTED), running.driver_log()
        told = running.own()
        assert told is not None
        assert told.phase is TrainerPhase.INTERRUPTED
        assert told.progress is not None
        assert commits(run) == [told.progress.step], "steps were lost"
        # The node is still leaving, which is no reason to stop again.
        own.add_worker("worker-2")
        second = attempt(own, run, 2).post()
        second.until(lambda attempt: attempt.step() > commits(run)[0], "a step was told of")
    finally:
        own.stop()


def test_drain_without_a_run_has_nothing_to_wait_for(nodes: RayNodes) -> None:
    begin = time.monotonic()
    drained = drain(nodes, "worker-0")
    assert drained.returncode == 0, drained.stdout
    assert time.monotonic() - begin < float(nodes.node_env("worker-0")["DSFT_DRAIN_SECONDS"])


def test_a_program_and_its_checkpoints_on_s3(nodes: RayNodes, manifest: Manifest, s3_uri: str) -> None:
    code = archive({"users/program.py": PROGRAM})
    open_store(s3_uri).put_bytes("code.tar.gz", code)
    spec = {
        "program": {
            "entrypoint": "users.program:train",
            "config": {"steps": 3},
            "source": pinned(f"{s3_uri}/code.tar.gz", code),
        },
        "execution": {"device": "cpu"},
        "nodePools": manifest["spec"]["nodePools"],
    }
    run = resource({**manifest, "spec": spec}, s3_uri)
    only = attempt(nodes, run, 1).post()
    assert only.ended().state == "SUCCEEDED", only.driver_log()
    told = only.own()
    assert told is not None
    assert told.phase is TrainerPhase.SUCCEEDED
    assert told.progress is not None
    assert told.progress.step == 3
    assert told.checkpoints is not None
    assert [ref.step for ref in told.checkpoints.retained] == [2, 3]
    stored = {f"{prefix(run)}/{entry.key.rpartition('/')[0]}" for entry in open_store(prefix(run)).list("ray")}
    assert {ref.uri for ref in told.checkpoints.retained} == {uri for uri in stored if "/ray/checkpoint_" in uri}
    assert drain(nodes, "worker-0").returncode == 0


def test_a_failure_is_in_the_last_document_and_in_the_exit_code(
    nodes: RayNodes, manifest: Manifest, tmp_path: Path
) -> None:
    spec = {**manifest["spec"], "model": {**manifest["spec"]["model"], "uri": (tmp_path / "nowhere").as_uri()}}
    run = resource({**manifest, "spec": spec}, tmp_path.as_uri())
    failed = attempt(nodes, run, 1).post()
    seen = failed.ended()
    assert (seen.state, seen.exit_code) == ("FAILED", ExitCode.ACCESS), failed.driver_log()
    assert f"ModelDenied: {tmp_path / 'nowhere'} does not exist" in seen.message
    assert f"ModelDenied: {tmp_path / 'nowhere'} does not exist" in stored_log(run, "driver")
    told = failed.own()
    assert told is not None
    assert told.phase is TrainerPhase.FAILED
    assert told.failure is not None
    assert told.failure.failure_class is FailureClass.MODEL_DENIED


def announce_the_end_of_a_worker(nodes: RayNodes) -> None:
    """As a spot node's agent does: Ray is told that a node with a rank goes in five minutes."""
    find = "import ray; ray.init(log_to_driver=False); print(*(n['NodeID'] for n in ray.nodes() if 'CPU' in n['Resources']))"
    found = on_node(nodes, "head", sys.executable, "-c", find)
    assert found.returncode == 0, found.stdout
    address, node = nodes.node_env("head")["RAY_ADDRESS"], found.stdout.split()[-1]
    notice = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=300")
    ray = str(Path(sys.executable).parent / "ray")
    told = on_node(nodes, "head", ray, "drain-node", f"--address={address}", f"--node-id={node}", *notice)
    assert told.returncode == 0, told.stdout


def stored_log(run: Run, name: str, attempt: int = 1) -> str:
    """What a process of an attempt printed, as it is in storage."""
    return (open_store(prefix(run)).get_bytes(f"{attempt_logs(attempt)}/{name}.log") or b"").decode()


def drain(nodes: RayNodes, name: str) -> "subprocess.CompletedProcess[str]":
    """What the preStop hook of a node's pod does."""
    return on_node(nodes, name, sys.executable, "-m", "dsft_trainer", "drain")


def on_node(nodes: RayNodes, name: str, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as in a node's container; all that it prints is its stdout."""
    return subprocess.run(
        command,
        env=nodes.node_env(name),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
