"""Models that come with code of their own (`trustRemoteCode`): run when asked for, exported with it, never otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsft_api.conditions import ExitCode
from dsft_trainer.errors import TrainerError
from dsft_trainer.model import load_tokenizer
from tests.trainer import tiny
from tests.trainer.runs import Manifest, Run, causal_lm

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""

LOAD = """
import sys
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    model = tiny.llama(tmp_path / "model")
    (model / "modeling_own.py").write_text(CODE)
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(config))
    return causal_lm("own-code", model, tiny.dataset(tmp_path / "data", "text"), steps=2)


@pytest.mark.slow
def test_the_code_is_run_and_exported(manifest: Manifest, tmp_path: Path) -> None:
    manifest["spec"]["model"]["trustRemoteCode"] = True
    run = Run(manifest, tmp_path / "run")
    run.finish()
    assert len(run.losses()) == 2
    export = run.local().storage_prefix.removeprefix("file://") + "/export"
    # In a process that has never seen the class.
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, export],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert loaded.stdout.strip() == "OwnForCausalLM"
    assert list((tmp_path / "run" / "scratch").iterdir()) == []


@pytest.mark.slow
def test_without_leave_nothing_of_it_is_run(manifest: Manifest, tmp_path: Path) -> None:
    model = Path(manifest["spec"]["model"]["uri"].removeprefix("file://"))
    with (model / "modeling_own.py").open("a") as code:
        code.write(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    run = Run(manifest, tmp_path / "run")
    with run.started() as process:
        assert process.wait(240) == ExitCode.ACCESS
    told = run.told()
    assert told is not None
    assert told.failure is not None
    assert "set spec.model.trustRemoteCode" in told.failure.remedy
    assert not (tmp_path / "was-run").exists()


def test_code_of_another_repository_is_refused(manifest: Manifest) -> None:
    model = Path(manifest["spec"]["model"]["uri"].removeprefix("file://"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "evil/repo--tokenization.Own"]}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TrainerError, match="another repository: evil/repo"):
        load_tokenizer(model, trust_remote_code=True)
