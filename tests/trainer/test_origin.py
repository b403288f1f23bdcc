"""Starting from a checkpoint of another run: which one is meant, and that it is still the one that was chosen."""

import json
from pathlib import Path

import pytest
import torch

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import EvaluationSpec, StartFrom
from dsft_trainer.checkpoint.origin import Pin, choose, open_origin
from dsft_trainer.checkpoint.store import Store, open_store
from dsft_trainer.engine import Engine
from dsft_trainer.errors import TrainerError
from tests.trainer.group_starts import Converter, Start, contents, of_two_ranks

pytestmark = pytest.mark.usefixtures("process_group")

EVALUATION = EvaluationSpec()


@pytest.fixture(params=["file", "s3"])
def namespace(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3_uri") if request.param == "s3" else (tmp_path / "runs" / "default").as_uri()


@pytest.fixture
def old(namespace: str, tmp_path: Path) -> Store:
    """A run with three commits, the first of which is the best."""
    store = open_store(f"{namespace}/old-0123abcd")
    store.put_bytes("run.json", json.dumps({"createdAt": "2026-01-01T00:00:00+00:00"}).encode())
    start = Start(store, tmp_path / "scratch")
    start.begin(1)
    for step, loss in [(3, 0.1), (6, 0.5), (9, 0.4)]:
        start.save(step, loss)
    return store


def chosen(namespace: str, run: str = "old", checkpoint: str = "latest") -> Pin:
    return choose(StartFrom(run=run, checkpoint=checkpoint), f"{namespace}/new-456789ab", EVALUATION, open_store)


def new_start(
    namespace: str, scratch: Path, pin: Pin, *, weights_only: bool = False, convert: Converter | None = None
) -> Start:
    def origin():
        return open_origin(pin, weights_only=weights_only, open_=open_store)

    return Start(open_store(f"{namespace}/new-456789ab"), scratch, convert=convert, origin=origin)


@pytest.mark.parametrize(
    ("checkpoint", "step"), [("latest", 9), ("best", 3), ("step-00000006-a1.g1", 6)], ids=["latest", "best", "a name"]
)
def test_which_checkpoint_is_meant(namespace: str, old: Store, tmp_path: Path, checkpoint: str, step: int) -> None:
    pin = chosen(namespace, checkpoint=checkpoint)
    assert pin.uri == f"{old.uri}/checkpoints/step-{step:08d}-a1.g1"
    assert open_origin(pin, weights_only=False, open_=open_store).commit.step == step


def test_of_two_runs_of_a_name_the_newer_one_is_meant(namespace: str, old: Store, tmp_path: Path) -> None:
    newer = open_store(f"{namespace}/old-00000000")
    newer.put_bytes("run.json", json.dumps({"createdAt": "2026-01-02T00:00:00+00:00"}).encode())
    start = Start(newer, tmp_path / "scratch")
    start.begin(1)
    start.save(2)
    # Another run's name that begins alike.
    open_store(f"{namespace}/old-one-0123abcd").put_bytes("run.json", b'{"createdAt": "2027"}')
    assert chosen(namespace).uri == f"{newer.uri}/checkpoints/step-00000002-a1.g1"


@pytest.mark.parametrize(
    ("run", "checkpoint", "message", "remedy"),
    [
        ("new", "latest", "spec.startFrom.run: there is no run new in ", "the same spec.storage.uri"),
        ("ol", "latest", "spec.startFrom.run: there is no run ol in ", "the same spec.storage.uri"),
        (
            "old",
            "step-00000007-a1.g1",
            "old-0123abcd has no checkpoint step-00000007-a1.g1",
            "it has: step-00000003-a1.g1, step-00000006-a1.g1, step-00000009-a1.g1",
        ),
    ],
)
def test_what_is_not_there_is_refused(
    namespace: str, old: Store, run: str, checkpoint: str, message: str, remedy: str
) -> None:
    # The run itself is no other run.
    open_store(f"{namespace}/new-456789ab").put_bytes("run.json", b"{}")
    with pytest.raises(TrainerError) as caught:
        chosen(namespace, run, checkpoint)
    assert caught.value.failure_class is FailureClass.CONFIG_INVALID
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_resume_goes_on_where_the_other_run_was(namespace: str, old: Store, tmp_path: Path) -> None:
    before = contents(old, "")
    pin = chosen(namespace)
    start = new_start(namespace, tmp_path / "scratch", pin)
    assert start.begin(1) == 9
    assert start.state.value == "step 9 of a1.g1"
    # Its early stopping waited for another metric perhaps.
    assert start.checkpointer.restorer.base is not None
    assert start.checkpointer.restorer.base.patience is not None
    assert start.checkpointer.restorer.patience is None
    store = start.checkpointer.store
    claim = json.loads(store.get_bytes("attempts/a1.g1.json") or b"")
    assert (claim.get("base"), claim["baseStep"], claim["origin"]) == (None, 9, pin.uri)
    start.save(12)
    assert contents(old, "") == before
    # From here on the run has commits of its own, and the other one may go.
    old.delete(list(before))
    again = new_start(namespace, tmp_path / "scratch", pin)
    assert again.begin(2) == 12
    assert again.state.value == "step 12 of a1.g1"


def test_a_run_that_is_through_leaves_nothing_to_resume(namespace: str, old: Store, tmp_path: Path) -> None:
    start = new_start(namespace, tmp_path / "scratch", chosen(namespace))
    start.begin(1)
    start.checkpointer.restorer.check_end(10)
    with pytest.raises(TrainerError, match="is at step 9, and training ends at step 9") as caught:
        start.checkpointer.restorer.check_end(9)
    assert caught.value.failure_class is FailureClass.CONFIG_INVALID
    # Its weights alone begin at step 0, and its own commits at the end need only be exported.
    weights = new_start(namespace, tmp_path / "weights", chosen(namespace), weights_only=True, convert=Converter())
    weights.begin(1)
    weights.checkpointer.restorer.check_end(9)
    weights.save(9)
    again = new_start(namespace, tmp_path / "again", chosen(namespace))
    again.begin(2)
    again.checkpointer.restorer.check_end(9)


def test_weights_begin_at_step_0(namespace: str, old: Store, tmp_path: Path) -> None:
    before = contents(old, "")
    convert = Converter()
    for attempt in (1, 2):
        start = new_start(namespace, tmp_path / "scratch", chosen(namespace), weights_only=True, convert=convert)
        assert start.begin(attempt) == 0
        assert start.state.value == "weights of step 9 of a1.g1"
    assert convert.calls == 1
    assert contents(old, "") == before
    start.save(3)
    store = start.checkpointer.store
    assert store.list("universal") == []
    again = new_start(namespace, tmp_path / "scratch", chosen(namespace), weights_only=True, convert=convert)
    assert again.begin(3) == 3
    assert again.state.value == "step 3 of a2.g1"


def test_the_other_run_may_have_had_other_ranks(namespace: str, tmp_path: Path) -> None:
    of_two_ranks(open_store(f"{namespace}/old-0123abcd"), tmp_path / "scratch")
    start = new_start(namespace, tmp_path / "scratch", chosen(namespace), convert=Converter())
    assert start.begin(1) == 3
    assert start.state.value == "step 3 of a1.g1"
    with pytest.raises(TrainerError, match="onWorldSizeChange is refuse"):
        new_start(namespace, tmp_path / "scratch", chosen(namespace)).begin(2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("gone", "is gone"), ("another", "any more"), ("damaged", "does not match its checksums")],
)
def test_what_is_not_what_it_was_is_refused(
    namespace: str, old: Store, tmp_path: Path, damage: str, message: str
) -> None:
    pin = chosen(namespace)
    key = "checkpoints/step-00000009-a1.g1/COMMIT.json"
    match damage:
        case "gone":
            old.delete([key])
        case "another":
            old.put_bytes(key, (old.get_bytes(key) or b"") + b"\n")
        case _:
            old.put_bytes("checkpoints/step-00000009-a1.g1/model.pt", b"?")
    with pytest.raises(TrainerError) as caught:
        new_start(namespace, tmp_path / "scratch", pin).begin(1)
    assert caught.value.failure_class is FailureClass.CONFIG_INVALID
    assert message in caught.value.message
    assert open_store(f"{namespace}/new-456789ab").list("") == []


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"weight": (5, 2), "bias": (3,)}, r"weight is \(5, 2\) there and \(3, 2\) here"),
        ({"weight": (3, 2)}, r"bias is None there and \(3,\) here"),
        ({"weight": (3, 2), "bias": (3,), "scale": (1,)}, r"scale is \(1,\) there and None here"),
    ],
    ids=["another shape", "less", "more"],
)
def test_another_model_is_refused_by_the_parameter(
    tmp_path: Path, there: dict[str, tuple[int, ...]], message: str
) -> None:
    """Before DeepSpeed, which would load it as far as its numbers go, has seen anything of it."""
    (tmp_path / "tag").mkdir()
    shapes = {"param_shapes": [{name: torch.Size(shape)} for name, shape in there.items()]}
    torch.save(shapes, tmp_path / "tag" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    engine = Engine(None, torch.nn.Linear(2, 3), torch.device("cpu"))
    with pytest.raises(TrainerError, match=f"checkpoint tag is of another model: {message}") as caught:
        engine.load_universal(tmp_path, "tag")
    assert caught.value.failure_class is FailureClass.CONFIG_INVALID


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tag").mkdir()
    states = {"param_shapes": [{"weight": torch.Size((3, 2))}], "dsft_frozen_digest": "sha256:there"}
    torch.save(states, tmp_path / "tag" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    model = torch.nn.Linear(2, 3, bias=False)
    engine = Engine(None, model, torch.device("cpu"), "sha256:here")
    with pytest.raises(TrainerError, match="checkpoint tag holds adapters of another model") as caught:
        engine.load(tmp_path, "tag")
    assert caught.value.failure_class is FailureClass.CONFIG_INVALID
