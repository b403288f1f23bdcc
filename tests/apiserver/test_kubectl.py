"""What a user sees with kubectl: columns, explanations, waiting, and that every example applies."""

from pathlib import Path

import pytest

from tests.apiserver.whole_status import WHOLE
from tests.unit.api.rule_table import MANIFEST

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def kubectl(api_server, namespace):
    """kubectl in the namespace of the test."""
    return lambda *arguments, **options: api_server.plane.kubectl(f"--namespace={namespace}", *arguments, **options)


def table(text: str) -> dict[str, str]:
    """The first row, by column."""
    head, row = text.splitlines()[:2]
    starts = [head.index(name) for name in head.split()]
    return {
        name: row[start:end].strip() for name, start, end in zip(head.split(), starts, [*starts[1:], None], strict=True)
    }


def test_columns(runs, kubectl):
    runs.create(MANIFEST)
    row = table(kubectl("get", "dsft"))
    assert row.pop("AGE").endswith("s")
    assert row == {"NAME": "chat", "PHASE": "", "READY": "", "STEP": "", "TOTAL": "", "ATTEMPT": ""}
    runs.apply_status("chat", WHOLE)
    row = table(kubectl("get", "dsft"))
    row.pop("AGE")
    assert row == {
        "NAME": "chat",
        "PHASE": "Running",
        "READY": "True",
        "STEP": "210",
        "TOTAL": "400",
        "ATTEMPT": "2",
    }
    wide = table(kubectl("get", "ml", "--output=wide"))
    shown = {"MODEL": "hf://org/model", "CHECKPOINT": "200", "GOODPUT": "0.95", "MESSAGE": "step 210 of 400"}
    assert list(wide.items())[-len(shown) :] == list(shown.items())


def test_explain(kubectl):
    text = kubectl("explain", "dsft.spec.training")
    assert "GROUP:      dsft.dev" in text
    assert "globalBatchSize\t<integer> -required-" in text
    assert "Samples per optimizer step over all ranks:" in " ".join(text.split())
    assert "ENUM: bf16 fp16 fp32" in " ".join(kubectl("explain", "dsft.spec.training.precision").split())


def test_wait_for_the_end(runs, kubectl):
    runs.create(MANIFEST)
    ended = [{**each, "status": "True"} for each in WHOLE["conditions"]]
    with pytest.raises(RuntimeError, match="timed out waiting"):
        kubectl("wait", "--for=condition=Succeeded", "dsft/chat", "--timeout=1s")
    runs.apply_status("chat", {**WHOLE, "conditions": ended})
    assert "condition met" in kubectl("wait", "--for=condition=Succeeded", "dsft/chat", "--timeout=5s")


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_applies(kubectl, example):
    said = kubectl("apply", "--dry-run=server", "--validate=strict", f"--filename={example}")
    assert "created (server dry run)" in said


def test_field_that_is_misspelt_is_refused(kubectl):
    text = (ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8").replace("numLabels", "numLabel")
    with pytest.raises(RuntimeError, match=r'unknown field "spec.model.numLabel"'):
        kubectl("apply", "--dry-run=server", "--validate=strict", "--filename=-", stdin=text)
