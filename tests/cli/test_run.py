"""`dsft run` from start to end, as a user has it: finished, interrupted, resumed, refused, diverged, hung."""

import json
import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from jsonschema import Draft4Validator
from safetensors.torch import load_file, save_file

from dsft_api.conditions import ExitCode, FailureClass, Phase
from dsft_api.crd import crd
from dsft_trainer.data.sampler import GlobalBatches
from tests.cli.command import Dsft, Ended, RunFolder, classifier, edited
from tests.trainer import tiny

# Others may use the cores: the bounds of `command` are the ones that matter.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMPILERS = ("cc", "gcc", "c++", "g++", "nvcc", "ninja")
TORCHRUN = ("--runtime", "torchrun")
STEPS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.dataset(tmp_path_factory.mktemp("data"), "classification", 96)


@pytest.fixture(scope="module")
def manifest(model: Path, rows: Path) -> dict[str, Any]:
    """Long enough to be interrupted."""
    return classifier(
        model,
        rows,
        **{
            "spec.execution.interconnect": {"minAllGatherGBps": 1e-6},
            "spec.training.maxSteps": STEPS,
            "spec.checkpoint.everySteps": 15,
            "spec.evaluation.everySteps": 20,
        },
    )


@pytest.fixture(scope="module")
def dsft(tmp_path_factory: pytest.TempPathFactory) -> Dsft:
    """A command on whose PATH every compiler leaves a mark instead of working."""
    folder = tmp_path_factory.mktemp("dsft")
    (folder / "bin").mkdir()
    for name in COMPILERS:
        shim = folder / "bin" / name
        shim.write_text(f"#!/bin/sh\necho {name} >> {folder}/compiled\nexit 1\n")
        shim.chmod(0o755)
    return Dsft(folder)


class TestFinished:
    """One run to the end."""

    @pytest.fixture(scope="class")
    def ended(self, dsft: Dsft, manifest: dict[str, Any]) -> Ended:
        ended = dsft("run", "-f", dsft.write(manifest), *TORCHRUN)
        assert ended.code == ExitCode.OK, ended.text
        return ended

    @pytest.fixture
    def run(self, ended: Ended, dsft: Dsft) -> RunFolder:
        return dsft.run_folders()[0]

    def test_it_says_what_it_did(self, ended: Ended, run: RunFolder) -> None:
        assert "2 ranks on cpu" in ended.err
        assert f"evaluation at step {STEPS}: loss" in ended.err
        assert "Succeeded" in ended.out
        for folder in (*(f"checkpoints/{commit}" for commit in run.commits), "export"):
            assert f"{run.path.as_uri()}/{folder}" in ended.out

    def test_its_status_says_so_in_the_schema_of_the_resource(self, run: RunFolder) -> None:
        status = run.status
        assert status.phase is Phase.SUCCEEDED
        assert status.progress is not None
        assert status.progress.step == status.progress.total_steps == STEPS
        assert [(attempt.number, attempt.to_step, attempt.exit_code) for attempt in status.attempts] == [(1, STEPS, 0)]
        assert status.interconnect is not None
        assert status.interconnect.ranks == 2
        assert status.interconnect.all_gather_gbps > 0
        assert status.output is not None
        assert status.output.uri == f"{run.path.as_uri()}/export"
        schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
        Draft4Validator(schema).validate(yaml.safe_load((run.path / "status.yaml").read_text())["status"])

    def test_each_second_of_it_is_accounted_for(self, run: RunFolder) -> None:
        usage, (attempt,) = run.status.usage, run.status.attempts
        assert usage is not None
        assert attempt.spent is not None
        assert attempt.end_time is not None
        parts = (usage.useful_seconds, usage.blocked_seconds, usage.restart_seconds)
        assert all(parts), usage
        assert (usage.redone_seconds, usage.waiting_seconds, usage.gpu_seconds) == (0, None, None)
        # Times in the status are whole seconds.
        whole = (attempt.end_time - attempt.start_time).total_seconds()
        assert sum(part or 0.0 for part in parts) == pytest.approx(whole, abs=2)
        assert attempt.spent.seconds == pytest.approx(whole, abs=2)
        assert usage.goodput == pytest.approx((usage.useful_seconds or 0.0) / attempt.spent.seconds, abs=0.01)

    def test_the_last_checkpoints_and_the_best_one_are_kept(self, run: RunFolder) -> None:
        losses = run.values("eval", "loss")
        assert list(losses) == [20, 40, 60]
        kept = {45, 60, min(losses, key=lambda step: losses[step])}
        assert run.commits == [f"step-{step:08d}-a1.g1" for step in sorted(kept)]
        assert [path.name for path in sorted((run.path / "checkpoints").iterdir())] == run.commits
        checkpoints = run.status.checkpoints
        assert checkpoints is not None
        assert [checkpoint.step for checkpoint in checkpoints.retained] == sorted(kept)
        assert checkpoints.best is not None
        assert checkpoints.best.metrics["loss"] == min(losses.values())

    def test_the_loss_falls(self, run: RunFolder) -> None:
        losses = run.values("train", "loss")
        assert list(losses) == list(range(1, STEPS + 1))
        assert sum(losses[step] for step in range(51, 61)) < sum(losses[step] for step in range(1, 11))

    def test_plain_transformers_loads_the_export_and_gets_the_same_loss(self, run: RunFolder, rows: Path) -> None:
        import torch
        from pyarrow import json as arrow_json
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from dsft_trainer.data.sampler import split_eval

        held_out = split_eval(arrow_json.read_json(rows), 0.25, seed=42)[1].to_pydict()
        model = AutoModelForSequenceClassification.from_pretrained(run.path / "export").eval()
        tokens = AutoTokenizer.from_pretrained(run.path / "export")(held_out["text"], padding=True, return_tensors="pt")
        with torch.no_grad():
            loss = model(**tokens, labels=torch.tensor(held_out["label"])).loss
        assert float(loss) == pytest.approx(run.values("eval", "loss")[STEPS], rel=1e-5)

    def test_tensorboard_reads_its_events(self, run: RunFolder) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run.path / "tensorboard" / "a1.g1"))
        events.Reload()
        losses = {event.step: event.value for event in events.Scalars("train/loss")}
        assert losses == pytest.approx(run.values("train", "loss"))

    def test_nothing_was_compiled(self, run: RunFolder, dsft: Dsft) -> None:
        assert not (dsft.folder / "compiled").exists()

    def test_the_same_command_says_that_it_is_done(self, run: RunFolder, dsft: Dsft, manifest: dict[str, Any]) -> None:
        again = dsft("run", "-f", dsft.write(manifest), *TORCHRUN)
        assert again.code == ExitCode.OK
        assert "tiny is done already; --fresh starts it again" in again.err
        assert not list(run.path.glob("attempts/a2*"))

    def test_status_tells_of_it(self, run: RunFolder, dsft: Dsft, manifest: dict[str, Any]) -> None:
        text = dsft("status", "-f", dsft.write(manifest))
        assert "Succeeded (not running)" in text.out
        assert re.search(r"goodput +\d+ %: useful ", text.out), text.out
        document = json.loads(dsft("status", "-f", dsft.write(manifest), "-o", "json").out)
        assert document["status"] == run.status.to_wire()
        assert document["running"] is False

    def test_ls_lists_its_checkpoints(self, run: RunFolder, dsft: Dsft) -> None:
        text = dsft("ls", run.path.as_uri())
        assert [line.split()[0] for line in text.out.splitlines()[1:]] == run.commits
        document = json.loads(dsft("ls", run.path.as_uri(), "-o", "json").out)
        assert [(commit["name"], commit["worldSize"]) for commit in document] == [(name, 2) for name in run.commits]


def test_status_of_a_run_that_never_was(dsft: Dsft, manifest: dict[str, Any]) -> None:
    ended = dsft("status", "-f", dsft.write(edited(manifest, {"metadata.name": "never"})))
    assert ended.code == ExitCode.OTHER
    assert "no run of" in ended.err
    assert "start it with: dsft run -f" in ended.err


class TestInterrupted:
    """The same manifest afresh; Ctrl-C in the middle; the same command again."""

    @pytest.fixture(scope="class")
    def reference(self, dsft: Dsft, manifest: dict[str, Any]) -> RunFolder:
        """The uninterrupted run: that of `TestFinished`, if it was there first."""
        assert dsft("run", "-f", dsft.write(manifest), *TORCHRUN).code == ExitCode.OK
        return dsft.run_folders()[0]

    @pytest.fixture(scope="class")
    def second(self) -> list[Ended]:
        """What a second command says while the first one runs."""
        return []

    @pytest.fixture(scope="class")
    def interrupted(
        self, reference: RunFolder, dsft: Dsft, manifest: dict[str, Any], second: list[Ended]
    ) -> tuple[Ended, RunFolder]:
        file = dsft.write(manifest)
        with dsft.start("run", "-f", file, "--fresh", *TORCHRUN) as running:
            running.until(lambda: len(dsft.run_folders()) == 2)
            second.append(dsft("run", "-f", file, *TORCHRUN))
            run = dsft.run_folders()[1]
            running.until(lambda: run.step >= 1)
            running.press_ctrl_c()
            return running.wait(), run

    def test_fresh_has_a_folder_of_its_own(
        self, interrupted: tuple[Ended, RunFolder], reference: RunFolder, dsft: Dsft
    ) -> None:
        assert [folder.path for folder in dsft.run_folders()] == [reference.path, interrupted[1].path]
        assert reference.status.phase is Phase.SUCCEEDED

    def test_a_second_command_is_refused_meanwhile(
        self, interrupted: tuple[Ended, RunFolder], second: list[Ended]
    ) -> None:
        assert second[0].code == ExitCode.BAD_INPUT
        assert "this run is running already -> wait for it, or stop it" in second[0].err

    def test_ctrl_c_commits_the_step_and_exits_6(self, interrupted: tuple[Ended, RunFolder]) -> None:
        ended, run = interrupted
        assert ended.code == ExitCode.INTERRUPTED, ended.text + run.log()
        assert "run the same command again" in ended.err
        assert run.status.phase is Phase.SUSPENDED
        last = max(run.values("train", "loss"))
        assert 1 <= last < STEPS
        assert run.commits[-1] == f"step-{last:08d}-a1.g1"
        assert not (run.path / "RESULT.json").exists()

    @pytest.fixture(scope="class")
    def resumed(self, interrupted: tuple[Ended, RunFolder], dsft: Dsft, manifest: dict[str, Any]) -> Ended:
        """Tried with another number of ranks first, which the manifest refuses for that time."""
        checkpoint = {**manifest["spec"]["checkpoint"], "onWorldSizeChange": "refuse"}
        strict = {**manifest, "spec": {**manifest["spec"], "checkpoint": checkpoint}}
        refused = dsft("run", "-f", dsft.write(strict), "--workers", "1", *TORCHRUN)
        assert refused.code == ExitCode.BAD_INPUT, refused.text
        assert "was written by 2 ranks, and 1 would load it" in refused.err
        assert "run with 2 ranks again" in refused.err
        return dsft("run", "-f", dsft.write(manifest), "-o", "json", *TORCHRUN)

    def test_the_same_command_goes_on_from_that_step(
        self, resumed: Ended, interrupted: tuple[Ended, RunFolder]
    ) -> None:
        run = interrupted[1]
        assert resumed.code == ExitCode.OK, resumed.text + run.log(2)
        at = max(run.values("train", "loss", attempt=1))
        claim = run.claim(2)
        assert (claim["base"], claim["baseStep"]) == (f"step-{at:08d}-a1.g1", at)
        assert list(run.values("train", "loss", attempt=2)) == list(range(at + 1, STEPS + 1))
        assert f"resuming from step {at}" in resumed.err

    def test_it_ends_as_if_nothing_had_been(
        self, resumed: Ended, interrupted: tuple[Ended, RunFolder], reference: RunFolder
    ) -> None:
        run = interrupted[1]
        for kind in ("train", "eval"):
            assert run.values(kind, "loss") == reference.values(kind, "loss")
        exports = [load_file(folder.path / "export" / "model.safetensors") for folder in (run, reference)]
        assert all(tensor.equal(exports[1][name]) for name, tensor in exports[0].items())

    def test_output_json_is_one_document(self, resumed: Ended, interrupted: tuple[Ended, RunFolder]) -> None:
        document = json.loads(resumed.out)
        assert document["status"]["phase"] == "Succeeded"
        assert [(a["number"], a["exitCode"]) for a in document["status"]["attempts"]] == [(1, 6), (2, 0)]
        assert document["statusFile"] == str(interrupted[1].path / "status.yaml")


def test_sigterm_does_what_ctrl_c_does(tmp_path: Path, manifest: dict[str, Any]) -> None:
    dsft = Dsft(tmp_path)
    with dsft.start("run", "-f", dsft.write(manifest), *TORCHRUN) as running:
        running.until(lambda: any(run.step >= 1 for run in dsft.run_folders()))
        running.process.terminate()
        ended = running.wait()
    run = dsft.run_folders()[0]
    assert ended.code == ExitCode.INTERRUPTED, ended.text + run.log()
    assert run.commits[-1] == f"step-{max(run.values('train', 'loss')):08d}-a1.g1"


@pytest.mark.drill
def test_on_ray_too_ctrl_c_commits_and_torchrun_goes_on(tmp_path: Path, manifest: dict[str, Any]) -> None:
    dsft = Dsft(tmp_path)
    file = dsft.write(manifest)
    with dsft.start("run", "-f", file) as running:
        running.until(lambda: any(run.step >= 1 for run in dsft.run_folders()))
        running.press_ctrl_c()
        interrupted = running.wait()
    run = dsft.run_folders()[0]
    assert interrupted.code == ExitCode.INTERRUPTED, interrupted.text + run.log()
    at = max(run.values("train", "loss"))
    assert run.commits[-1] == f"step-{at:08d}-a1.g1"
    assert dsft("run", "-f", file, *TORCHRUN).code == ExitCode.OK, run.log(2)
    assert run.claim(2)["baseStep"] == at
    assert list(run.values("train", "loss")) == list(range(1, STEPS + 1))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, model: Path, rows: Path
) -> None:
    """One word of the vocabulary is NaN, and the data order brings it in the sixth batch."""
    poisoned = tiny.bert(tmp_path / "model")
    weights = load_file(poisoned / "model.safetensors")
    words = weights["bert.embeddings.word_embeddings.weight"]
    words[tiny.tokenizer(classifier=True).convert_tokens_to_ids("#")] = math.nan
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    lines = tiny.rows("classification", 96)
    lines[GlobalBatches(96, 8, seed=42).batch(5)[0]]["text"] += "#"
    data = tiny.write_jsonl(tmp_path / "data" / "train.jsonl", lines)

    dsft = Dsft(tmp_path)
    manifest = classifier(
        poisoned,
        data,
        **{"spec.data.evalFraction": None, "spec.evaluation": None, "spec.checkpoint": {"everySteps": 2}},
    )
    ended = dsft("run", "-f", dsft.write(manifest), *TORCHRUN)
    run = dsft.run_folders()[0]
    assert ended.code == ExitCode.DIVERGED, ended.text + run.log()
    assert "the loss of step 6 is nan" in ended.err
    assert "learningRate" in ended.err
    assert run.status.attempts[0].failure_class is FailureClass.DIVERGED
    assert run.commits == ["step-00000002-a1.g1", "step-00000004-a1.g1"]
    kept = run.status.attempts[0].evidence or ""
    assert re.fullmatch(rf"{run.path.as_uri()}/logs/attempt-1/last-lines-rank-[01]\.txt", kept)
    assert kept in ended.err
    lines = Path(kept.removeprefix("file://")).read_text().splitlines()
    assert len(lines) <= 50
    assert any("the loss of step 6 is nan" in line for line in lines)


@pytest.fixture
def frozen() -> Iterator[list[psutil.Process]]:
    """Processes to thaw and end, whatever happens."""
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        if process.is_running():
            process.kill()


@pytest.mark.drill
def test_a_rank_that_stands_still_ends_the_run(
    tmp_path: Path, manifest: dict[str, Any], frozen: list[psutil.Process]
) -> None:
    dsft = Dsft(tmp_path)
    file = dsft.write(edited(manifest, {"spec.deadlines.stallSeconds": 40}))
    with dsft.start("run", "-f", file, *TORCHRUN) as running:
        running.until(lambda: any(run.step >= 1 for run in dsft.run_folders()))
        servers = [process for process in running.descendants() if "forkserver" in " ".join(process.cmdline())]
        ranks = [process for process in servers if process.parent() in servers]
        assert len(ranks) == 2
        frozen.append(ranks[1])
        ranks[1].send_signal(signal.SIGSTOP)
        ended = running.wait()
    run = dsft.run_folders()[0]
    assert ended.code == ExitCode.HANG, ended.text + run.log()
    assert "no step, save or evaluation batch finished in 40 s" in ended.err
    assert run.status.attempts[0].failure_class is FailureClass.HANG
    assert "most recent call first" in run.log(), "no stacks in the log"
    stacks = run.path / "logs" / "attempt-1" / "stacks-rank-0.txt"
    assert "most recent call first" in stacks.read_text()
    assert f"{stacks.parent.as_uri()}/stacks-rank-*" in (run.status.attempts[0].message or "")
    assert run.status.attempts[0].evidence == stacks.as_uri()
    assert [path.name for path in stacks.parent.iterdir()] == [stacks.name], "a rank that is stopped can write nothing"
    assert not any(rank.is_running() for rank in ranks)
