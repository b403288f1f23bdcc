"""A run of adapters that is interrupted, on other numbers of ranks, or taken up by another run trains as if it had not been.

Its checkpoints hold nothing of the model below; that it is the same one they know by its digest.
"""

from pathlib import Path

import pytest
import torch

from tests.trainer.killing import in_storage
from tests.trainer.runs import Manifest, Run
from tests.trainer.test_world_size import RELATIVE_TOLERANCE, manifest, train, values

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def adapted(folder: Path, name: str, storage: str) -> Manifest:
    document = in_storage(manifest(folder, name), storage)
    document["spec"]["training"]["lora"] = {"rank": 4, "alpha": 8}
    document["spec"]["export"] = {"format": "none"}
    return document


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run on two ranks without a stop, two that are stopped after steps, and two that start from its checkpoints."""
    root = tmp_path_factory.mktemp("lora-family")
    runs = {}
    legs = {
        "straight": (".2",),
        "stopped": ("2", "2", ".2"),
        "resized": ("2", "1", ".2"),
        "resumed": (".1",),
        "weights": (".2",),
    }
    origins = {
        "resumed": {"run": "straight", "checkpoint": "step-00000005-a1.g1"},
        "weights": {"run": "straight", "mode": "weights"},
    }
    for name in legs:
        document = adapted(root, name, (root / "storage").as_uri())
        document["spec"] |= {"startFrom": origins[name]} if name in origins else {}
        runs[name] = Run(document, root / name)
    train(root, *(word for name, numbers in legs.items() for word in (str(runs[name].folder), *numbers)))
    return runs


def test_a_run_that_was_stopped_has_the_losses_of_one_that_was_not(family: dict[str, Run]) -> None:
    assert [claim.base_step for claim in family["stopped"].claims()] == [0, 1, 2]
    for metric in ("loss", "grad_norm", "learning_rate"):
        assert values(family["stopped"], metric) == values(family["straight"], metric)


def test_two_ranks_then_one_then_two_have_the_same_losses(family: dict[str, Run]) -> None:
    starts = [(claim.world_size, claim.base_step) for claim in family["resized"].claims()]
    assert starts == [(2, 0), (1, 1), (2, 2)]
    assert values(family["resized"], "learning_rate") == values(family["straight"], "learning_rate")
    assert values(family["resized"], "loss") == pytest.approx(
        values(family["straight"], "loss"), rel=RELATIVE_TOLERANCE
    )


def test_another_run_goes_on_with_the_adapters(family: dict[str, Run]) -> None:
    """On one rank, from a checkpoint of two."""
    rest = values(family["straight"], "loss")[5:]
    assert values(family["resumed"], "loss", first=6) == pytest.approx(rest, rel=RELATIVE_TOLERANCE)


def test_another_run_begins_with_the_adapters(family: dict[str, Run]) -> None:
    """The weights that were trained, and optimizer, schedule and data from the beginning."""
    weights, straight = family["weights"], family["straight"]
    assert values(weights, "learning_rate") == values(straight, "learning_rate")
    assert values(weights, "loss")[0] < values(straight, "loss")[1]


def test_checkpoints_know_the_model_below_on_any_number_of_ranks(family: dict[str, Run]) -> None:
    states = [
        torch.load(path, weights_only=False)
        for run in family.values()
        for path in Path(run.store.uri.removeprefix("file://")).glob("checkpoints/*/*_model_states.pt")
    ]
    assert {state["dp_world_size"] for state in states} == {1, 2}
    (digest,) = {state["dsft_frozen_digest"] for state in states}
    assert digest.startswith("sha256:")
    trained = {name for state in states for group in state["param_shapes"] for name in group}
    assert all(".lora_" in name for name in trained)
