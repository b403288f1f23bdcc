"""What an error tells of itself, and what it must not."""

from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import ProgramSpec
from dsft_trainer.errors import TrainerError
from dsft_trainer.program import run_program


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("401 for token geheim-geheim at the Hub", "401 for token [redacted] at the Hub"),
        ("hf_abcdefghijklmnopqrstuvwxyz was refused", "[redacted] was refused"),
        ("cannot reach https://me:word@tracker.corp/api", "cannot reach [redacted]tracker.corp/api"),
        # Too short to be told from words.
        ("no such key: abc", "no such key: abc"),
        ("step 12 of 40: loss is nan", "step 12 of 40: loss is nan"),
    ],
)
def test_secrets_are_not_told(monkeypatch: pytest.MonkeyPatch, text: str, told: str) -> None:
    monkeypatch.setenv("TRACKER_TOKEN", "geheim-geheim")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert TrainerError(FailureClass.UNKNOWN, text).report().message == told


def test_nor_by_the_traceback_of_a_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_API_KEY", "0123456789abcdef")
    (tmp_path / "leaking.py").write_text(
        "import os\ndef train(config):\n    raise ValueError('refused: ' + os.environ['MY_API_KEY'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainerError) as raised:
        run_program(ProgramSpec(entrypoint="leaking:train"))
    message = raised.value.report().message
    assert "0123456789abcdef" not in message
    assert "refused: [redacted]" in message
