"""`dsft preflight`: what a run of the manifest would find missing on this machine, without a start of ranks."""

import json
from pathlib import Path

import pytest

from dsft_api.conditions import ExitCode
from tests.cli.command import Dsft, edited
from tests.trainer import tiny
from tests.trainer.runs import causal_lm

pytestmark = pytest.mark.timeout(600)


def test_before_a_run(tmp_path: Path) -> None:
    dsft = Dsft(tmp_path)
    model = tiny.llama(tmp_path / "model", chat_template=tiny.CHATML)
    manifest = causal_lm("tiny", model, tiny.dataset(tmp_path / "data", "messages", 8), steps=1)
    good = dsft("preflight", "-f", dsft.write(manifest))
    assert (good.code, good.out) == (ExitCode.OK, "default/tiny: nothing was found\n")
    assert "[[The ship was seen in the morning.<|im_end|>" in good.err, "the sample, as it is trained on"

    edits = {"spec.data.train.uri": "file:///nowhere.jsonl", "spec.startFrom": {"run": "nobody"}}
    bad = dsft("preflight", "-f", dsft.write(edited(manifest, edits)), "--output=json")
    assert bad.code == ExitCode.BAD_INPUT
    told = json.loads(bad.out)["findings"]
    assert [(finding["class"], finding["field"]) for finding in told] == [
        ("ConfigInvalid", "spec.startFrom"),
        ("DataInvalid", "spec.data.train"),
    ]
    assert not dsft.run_folders(), "no run has begun"
