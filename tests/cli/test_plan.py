"""`dsft plan`: what it says, what it cannot know, and its exit code."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dsft_cli.app import app
from tests.trainer import tiny
from tests.trainer.runs import causal_lm


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    tiny.llama(folder / "model")
    tiny.dataset(folder, "text")
    return folder


def planned(folder: Path, manifest: dict[str, Any], *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and document."""
    file = folder / "manifest.yaml"
    file.write_text(yaml.safe_dump(manifest))
    result = CliRunner().invoke(app, ["plan", "-f", str(file), "-o", "json", *options])
    return result.exit_code, json.loads(result.stdout)


def manifest_of(assets: Path, **sections: Any) -> dict[str, Any]:
    made = causal_lm("planned", assets / "model", assets / "text.jsonl", steps=4)
    made["spec"] |= sections
    return made


def test_a_run_on_this_machine(assets: Path, tmp_path: Path) -> None:
    code, plan = planned(tmp_path, manifest_of(assets), "--workers", "2")
    assert code == 0
    assert plan["steps"] == {
        "steps": 4,
        "samples": 32,
        "epochs": 0.5,
        "tokens": plan["steps"]["tokens"],
        "evaluations": 0,
    }
    assert plan["data"]["rows"] == 64
    assert plan["batch"]["gradientAccumulationSteps"] == 2
    assert plan["missing"] == []
    text = CliRunner().invoke(app, ["plan", "-f", str(tmp_path / "manifest.yaml")]).stdout
    assert "GiB" in text


def test_what_does_not_fit_is_an_error(assets: Path, tmp_path: Path) -> None:
    pools = [{"name": "gpus", "nodes": 1, "gpusPerNode": 2, "resources": {"requests": {"memory": "64Gi"}}}]
    sections = {"nodePools": pools, "execution": {"microBatchSize": 4}}
    code, plan = planned(tmp_path, manifest_of(assets, **sections), "--gpu-memory", "1Gi")
    assert code == 2
    assert [problem["field"] for problem in plan["problems"]] == ["spec.nodePools"]


def test_without_model_or_data_it_says_what_is_not_known(assets: Path, tmp_path: Path) -> None:
    made = manifest_of(assets, nodePools=[{"name": "gpus", "gpusPerNode": 2}], execution={"microBatchSize": 4})
    made["spec"]["data"]["train"]["uri"] = "file:///nowhere/text.jsonl"
    code, plan = planned(tmp_path, made)
    assert (code, plan["model"]["parameters"] > 0, "data" in plan, plan["steps"]["steps"]) == (0, True, False, 4)
    assert [text.split(":")[0] for text in plan["missing"]] == [
        "data",
        "whether it fits the GPUs",
        "whether it fits the nodes",
    ]
    made["spec"]["model"]["uri"] = "file:///nowhere"
    code, plan = planned(tmp_path, made)
    assert (code, "model" in plan, "gpuMemory" in plan) == (0, False, False)
    assert plan["missing"][0].startswith("model and data: /nowhere does not exist")


def test_an_option_that_is_no_quantity_is_refused(assets: Path, tmp_path: Path) -> None:
    code, told = planned(tmp_path, manifest_of(assets), "--gpu-memory", "much")
    assert code == 2
    assert told["problems"][0]["field"] == "--gpu-memory"
