"""spec.program: a function of the user's in place of the built-in training."""

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dsft_api.conditions import ExitCode, FailureClass, Phase
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.spec.identity import ProgramSpec
from dsft_trainer.errors import TrainerError
from dsft_trainer.program import check_modules, datasets_of, run_program
from dsft_trainer.runtime.ray_program import reported
from tests.cli.command import Dsft, RunFolder
from tests.trainer.archives import archive, pinned
from tests.trainer.runs import Manifest

SOURCE = """
import os
import signal
import tempfile
import time
from pathlib import Path

import ray.train

from dsft_trainer import context as run

TAKEN = []


def take(config):
    TAKEN.append(config)


def feed(config):
    return {"train": list(range(config["rows"]))}


def fail(config):
    raise ValueError("the data has holes\\nand more")


def lose_peer(config):
    raise RuntimeError("Connection closed by peer [10.0.0.1]:1")


def train(config):
    context, checkpoint, begin = ray.train.get_context(), ray.train.get_checkpoint(), 0
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            begin = int((Path(folder) / "shard-1").read_text())
    for step in range(begin + 1, config["steps"] + 1):
        if step == config.get("dies_at") and begin == 0 and context.get_world_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        stopping = run.drain_requested()
        while step == config.get("waits_at") and not stopping:
            time.sleep(0.05)
            stopping = run.drain_requested()
        metrics = {"step": step, "total_steps": config["steps"], "loss": 1 / step, "accuracy": 0.5, "begin": begin}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / f"shard-{context.get_world_rank()}").write_text(str(step))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        if stopping:
            return
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's that can be imported here and in processes."""
    name = f"program_{abs(hash(tmp_path))}"
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    return name


def caught(entrypoint: str, **config: object) -> TrainerError:
    with pytest.raises(TrainerError) as raised:
        run_program(ProgramSpec(entrypoint=entrypoint, config=config))
    return raised.value


class TestCall:
    def test_the_function_gets_the_config(self, program: str) -> None:
        run_program(ProgramSpec(entrypoint=f"{program}:take", config={"depth": 3}))
        assert sys.modules[program].TAKEN == [{"depth": 3}]

    def test_what_it_raises_is_its_own_fault_and_shown(self, program: str) -> None:
        error = caught(f"{program}:fail")
        assert error.failure_class is FailureClass.USER_CODE
        assert error.message.startswith("ValueError: the data has holes\n")
        assert 'raise ValueError("the data has holes' in error.message
        assert "dsft_trainer" not in error.message

    def test_an_entrypoint_of_every_image_that_raises(self) -> None:
        error = caught("json:loads")
        assert error.failure_class is FailureClass.USER_CODE
        assert "the JSON object must be str, bytes or bytearray, not dict" in error.message

    def test_a_lost_peer_is_not_its_fault(self, program: str) -> None:
        assert caught(f"{program}:lose_peer").failure_class is FailureClass.WORKER_LOST

    @pytest.mark.parametrize(
        ("entrypoint", "word"),
        [
            ("no_such_module:train", "no module no_such_module"),
            ("json.no_such:train", "no module json.no_such"),
            ("json:no_such", "module json has no function no_such"),
            ("json:__name__", "module json has no function __name__"),
        ],
    )
    def test_what_is_not_there_is_named(self, entrypoint: str, word: str) -> None:
        error = caught(entrypoint)
        assert error.failure_class is FailureClass.CONFIG_INVALID
        assert "spec.program.entrypoint" in error.message
        assert word in error.message

    @pytest.mark.parametrize("module", ["no_such_module", "json.no_such", "no_such.module"])
    def test_a_module_that_is_not_there_is_seen_before_anything_starts(self, module: str) -> None:
        with pytest.raises(TrainerError) as raised:
            check_modules(ProgramSpec(entrypoint=f"{module}:train"))
        assert raised.value.failure_class is FailureClass.CONFIG_INVALID
        assert module in raised.value.message

    def test_datasets_come_from_a_function_of_their_own(self, program: str) -> None:
        spec = ProgramSpec(entrypoint="json:loads", datasets=f"{program}:feed", config={"rows": 3})
        check_modules(spec)
        assert datasets_of(spec) == {"train": [0, 1, 2]}
        assert datasets_of(ProgramSpec(entrypoint="json:loads")) == {}

    @pytest.mark.parametrize(
        ("function", "kind", "word"),
        [
            ("take", FailureClass.USER_CODE, "take returned NoneType"),
            ("fail", FailureClass.USER_CODE, "ValueError: the data has holes"),
            ("none", FailureClass.CONFIG_INVALID, "has no function none"),
        ],
    )
    def test_datasets_that_are_none(self, program: str, function: str, kind: FailureClass, word: str) -> None:
        with pytest.raises(TrainerError) as raised:
            datasets_of(ProgramSpec(entrypoint="json:loads", datasets=f"{program}:{function}"))
        assert raised.value.failure_class is kind
        assert word in raised.value.message


class TestProgress:
    """From what a program reports to the run's progress."""

    START = Progress(seq=3, run_uid="u", attempt=1, phase=TrainerPhase.STARTING, updated_at=datetime.now(UTC))

    def test_known_names_are_progress_and_other_numbers_evaluation(self) -> None:
        metrics = {"step": 5, "total_steps": 20, "loss": 0.5, "accuracy": 0.25, "note": "x", "flag": True}
        told = reported(self.START, metrics, 1)
        assert (told.seq, told.phase) == (4, TrainerPhase.TRAINING)
        assert told.progress is not None
        assert (told.progress.step, told.progress.total_steps, told.progress.percent) == (5, 20, 25.0)
        assert told.progress.loss == 0.5
        assert told.evaluation is not None
        assert told.evaluation.metrics == {"accuracy": 0.25, "flag": 1.0}
        Progress.model_validate_json(told.model_dump_json(by_alias=True, exclude_none=True))

    def test_without_a_step_reports_are_counted(self) -> None:
        told = reported(self.START, {"loss": float("nan")}, 7)
        assert told.progress is not None
        assert (told.progress.step, told.progress.loss, told.evaluation) == (7, None, None)

    def test_until_its_first_report_it_starts_and_a_checkpoint_keeps_what_came_before_it(self) -> None:
        start = self.START.model_copy(update={"updated_at": datetime.now(UTC) - timedelta(seconds=10)})
        first = reported(start, {}, 1)
        assert first.spent is not None
        assert first.spent.restart_seconds == first.spent.seconds >= 10
        trained = first.model_copy(update={"updated_at": first.updated_at - timedelta(seconds=5)})
        second = reported(trained, {}, 2).spent
        assert second is not None
        assert second.uncommitted_seconds == second.useful_seconds >= 5
        third = reported(trained, {}, 2, has_checkpoint=True).spent
        assert third is not None
        assert (third.useful_seconds >= 5, third.uncommitted_seconds) == (True, 0)


def manifest(program: str, function: str, **config: object) -> Manifest:
    return {
        "apiVersion": "dsft.dev/v1alpha1",
        "kind": "DeepSpeedFineTune",
        "metadata": {"name": "mine"},
        "spec": {"program": {"entrypoint": f"{program}:{function}", "config": config}, "execution": {"device": "cpu"}},
    }


def steps(run: RunFolder) -> list[int]:
    """Those of the checkpoints in the status."""
    assert run.status.checkpoints is not None
    return [ref.step for ref in run.status.checkpoints.retained]


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestRun:
    """`dsft run` of a program. By default two checkpoints are kept."""

    @pytest.mark.drill
    def test_lost_and_stopped_the_program_goes_on_from_its_checkpoint(self, tmp_path: Path) -> None:
        """A rank is lost before step 6; at step 7 the program waits until it is asked to stop. Its code is an archive's."""
        dsft = Dsft(tmp_path)
        document = manifest("from_elsewhere", "train", steps=8, dies_at=6, waits_at=7)
        content = archive({"from_elsewhere.py": SOURCE})
        (tmp_path / "code.tar.gz").write_bytes(content)
        document["spec"]["program"]["source"] = pinned((tmp_path / "code.tar.gz").as_uri(), content)
        file = dsft.write(document)
        with dsft.start("run", "-f", file) as running:
            running.until(lambda: any(run.step >= 6 for run in dsft.run_folders()))
            running.press_ctrl_c()
            stopped = running.wait()
        (run,) = dsft.run_folders()
        assert stopped.code == ExitCode.INTERRUPTED, stopped.text + run.log()
        assert "ranks lost, starting them again" in stopped.err
        assert not (run.path / "RESULT.json").exists()
        assert run.status.phase is Phase.SUSPENDED
        assert steps(run) == [6, 7]
        # A report that came back is in Ray's book when its rank goes.
        assert run.status.evaluation is not None
        assert run.status.evaluation.metrics == {"accuracy": 0.5, "begin": 5}

        done = dsft("run", "-f", file)
        assert done.code == ExitCode.OK, done.text + run.log(2)
        status = run.status
        assert status.phase is Phase.SUCCEEDED
        first, second = status.attempts
        assert (first.restarts, second.restarts) == (1, None)
        assert [loss.failure_class for loss in first.losses] == [FailureClass.WORKER_LOST]
        assert status.progress is not None
        assert (status.progress.step, status.progress.percent) == (8, 100.0)
        assert status.evaluation is not None
        assert status.evaluation.metrics == {"accuracy": 0.5, "begin": 7}
        assert (first.from_step, second.from_step) == (0, 7)
        assert steps(run) == [7, 8]
        assert status.checkpoints is not None
        latest = status.checkpoints.latest
        assert latest is not None
        assert latest == status.checkpoints.best
        assert (latest.step, latest.world_size, latest.bytes, latest.metrics["loss"]) == (8, 2, 2, 1 / 8)
        kept = {Path(ref.uri.removeprefix("file://")) for ref in status.checkpoints.retained}
        assert kept == {path for path in run.path.glob("ray/checkpoint_*") if path.is_dir()}
        assert [ref["step"] for ref in json.loads(dsft("ls", run.path.as_uri(), "--output", "json").out)] == [7, 8]
        assert (run.path / "RESULT.json").exists()
        assert "is done already" in dsft("run", "-f", file).err

    def test_an_exception_ends_the_run_with_the_traceback(self, tmp_path: Path, program: str) -> None:
        dsft = Dsft(tmp_path)
        ended = dsft("run", "-f", dsft.write(manifest(program, "fail")))
        (run,) = dsft.run_folders()
        assert ended.code == ExitCode.OTHER, ended.text + run.log()
        (attempt,) = run.status.attempts
        assert (attempt.failure_class, attempt.restarts) == (FailureClass.USER_CODE, None)
        assert attempt.message is not None
        assert attempt.message.startswith("ValueError: the data has holes")
        assert "correct the program named in spec.program" in ended.err

    def test_torchrun_does_not_run_programs(self, tmp_path: Path) -> None:
        dsft = Dsft(tmp_path)
        ended = dsft("run", "-f", dsft.write(manifest("json", "loads")), "--runtime", "torchrun")
        assert ended.code == ExitCode.BAD_INPUT
        assert "spec.program: needs Ray -> use --runtime ray" in ended.err
