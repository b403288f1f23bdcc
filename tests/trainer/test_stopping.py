"""When training stops early: a table of evaluations, what a restart knows, and a run from end to end with its export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsft_api.layout import CHECKPOINTS, EXPORT, RESULT_FILE
from dsft_api.spec.identity import EvaluationSpec
from dsft_trainer.checkpoint.commits import Patience
from dsft_trainer.checkpoint.listing import read_commits
from dsft_trainer.stopping import Stopper
from tests.trainer import tiny
from tests.trainer.hub_server import HubServer
from tests.trainer.runs import Run, causal_lm


def stopper(patience: int = 2, min_delta: float = 0.0, metric: str = "loss", state: Patience | None = None) -> Stopper:
    stopping = {"patience": patience, "minDelta": min_delta}
    return Stopper(EvaluationSpec.model_validate({"metric": metric, "earlyStopping": stopping}), state)


# Values of the evaluations -> after how many of them training stops; None: it does not.
TABLE: tuple[tuple[str, dict[str, Any], list[float], int | None], ...] = (
    ("always better", {}, [3, 2, 1, 0.5], None),
    ("twice no better", {}, [3, 2, 2, 2.5, 1], 4),
    ("better in between", {}, [3, 3, 2, 2, 1, 1, 0.5], None),
    ("patience of one", {"patience": 1}, [3, 2, 2], 3),
    ("too little better", {"min_delta": 0.1}, [3, 2.95, 2.91, 1], 3),
    ("slowly better counts from the best, not from the last", {"min_delta": 0.1}, [3, 2.95, 2.85, 2.8, 2.76], 5),
    ("larger is better", {"metric": "accuracy"}, [0.5, 0.6, 0.55, 0.6], 4),
)


@pytest.mark.parametrize(("changes", "values", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
@pytest.mark.parametrize("restarted", [False, True])
def test_when_training_stops(
    changes: dict[str, Any], values: list[float], expected: int | None, restarted: bool
) -> None:
    watching = stopper(**changes)
    stopped = None
    for number, value in enumerate(values, start=1):
        if restarted:
            # A commit holds what was known.
            kept = watching.patience and Patience.model_validate_json(watching.patience.model_dump_json())
            watching = stopper(**changes, state=kept)
        watching.see({watching.evaluation.metric: value})
        if watching.stop:
            stopped = number
            break
    assert stopped == expected


def test_without_early_stopping_nothing_is_kept_and_nothing_stops() -> None:
    watching = Stopper(EvaluationSpec())
    for _ in range(10):
        watching.see({"loss": 1.0})
    assert (watching.stop, watching.patience, watching.message(10, 10)) == (False, None, "done")


@pytest.mark.slow
@pytest.mark.timeout(2600)
def test_a_run_stops_early_exports_its_best_checkpoint_and_pushes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate that is far too high the first evaluations are the best. Then it is called again."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    document = causal_lm("early", tiny.llama(tmp_path / "model"), tiny.dataset(tmp_path, "text"), steps=40)
    document["spec"] |= {
        "evaluation": {"everySteps": 2, "earlyStopping": {"patience": 2}},
        "checkpoint": {"everySteps": 40, "keepLast": 1},
        "tracking": {"tensorboard": False, "wandb": {"project": "p"}},
        "export": {"pushToHub": {"repoId": "org/early"}},
    }
    document["spec"]["data"]["evalFraction"] = 0.25
    document["spec"]["training"]["optimizer"]["learningRate"] = 0.3
    run = Run(document, tmp_path / "run")
    with HubServer("hf_test") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.uri)
        run.finish(seconds=1200)
        (claim,) = run.claims()
        losses = {line["step"]: line["loss"] for line in run.metrics(claim.id) if line["kind"] == "eval"}
        last, chosen = max(losses), min(losses, key=lambda step: (losses[step], step))
        assert last == chosen + 4 < 40
        told = run.told()
        assert told is not None
        assert (told.message or "").startswith(f"stopped early at step {last} of 40: loss was not better than")
        commits = {commit.step: commit for commit in read_commits(run.store)}
        assert set(commits) == {chosen, last}
        assert commits[last].patience == Patience(best=losses[chosen], without=2)

        exported = tmp_path / "exported.safetensors"
        run.store.get_file(f"{EXPORT}/model.safetensors", exported)
        best, weights = whole(run, commits[chosen].name, tmp_path / "best"), load_file(exported)
        assert weights.keys() <= best.keys()
        assert all(torch.equal(weights[name], best[name]) for name in weights)
        repository = hub.repositories["org/early"]
        assert repository.files["model.safetensors"] == exported.read_bytes()
        assert told.output is not None
        assert told.output.hub == f"org/early@{repository.commits[-1]}"
        assert any(entry.key.endswith(f"run-{run.local().uid}.wandb") for entry in run.store.list("wandb"))

        # The end was lost, the commits were not: nothing is trained again, and the same is exported and pushed.
        before, pushed = run.weights(), list(repository.commits)
        run.store.delete([RESULT_FILE])
        run.finish(seconds=1200)
        assert run.weights() == before
        assert repository.commits == pushed
        assert run.metrics(run.claims()[-1].id) == []


def whole(run: Run, name: str, folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint, by hand: every rank's partition of each tensor, side by side."""
    shards: list[dict[str, Any]] = []
    shapes: dict[str, torch.Size] = {}
    for rank in range(2):
        for kind in ("optim", "model"):
            file = f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
            folder.mkdir(exist_ok=True)
            run.store.get_file(f"{CHECKPOINTS}/{name}/{file}", folder / file)
        shards.append(torch.load(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", weights_only=False))
        states = torch.load(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", weights_only=False)
        shapes = {key: shape for group in states["param_shapes"] for key, shape in group.items()}
    flat = [torch.cat(shard["optimizer_state_dict"]["fp32_flat_groups"]) for shard in shards]
    weights, at = {}, 0
    for key, shape in shapes.items():
        share = -(-shape.numel() // 2)
        both = torch.cat([part[at : at + share] for part in flat])
        weights[key] = both[: shape.numel()].view(shape)
        at += share
    return weights
