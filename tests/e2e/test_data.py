"""Training data that does not come as one file to each pod: a stream of shards, and a chat template from a ConfigMap."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsft_api.conditions import FailureClass, Phase
from tests.e2e.breaking import workers
from tests.e2e.manifests import Assets, tiny_run
from tests.e2e.s3 import Bucket
from tests.e2e.tenant import Tenant
from tests.e2e.trial import lost
from tests.trainer import tiny

pytestmark = pytest.mark.long
FILES, ROWS = 6, 64
STEPS = 240
TEMPLATE = "chat-template"
# As on one machine, where a run that was killed trains what the other one does.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def model(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """spec.model: a causal-lm without a chat template of its own."""
    folder = tiny.llama(tmp_path_factory.mktemp("model"))
    return {"uri": bucket.upload(folder, "assets/llama"), "task": "causal-lm"}


@pytest.fixture(scope="module")
def streamed(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """spec.data: a folder of files, and rows of their own to evaluate on."""
    folder = tmp_path_factory.mktemp("stream")
    lines = tiny.rows("text", FILES * ROWS)
    for number in range(FILES):
        tiny.write_jsonl(folder / f"{number}.jsonl", lines[number * ROWS : (number + 1) * ROWS])
    held_out = tiny.write_jsonl(tmp_path_factory.mktemp("held-out") / "held-out.jsonl", tiny.rows("text", 16))
    train, evaluated = bucket.upload(folder, "assets/stream"), bucket.upload(held_out, "assets/held-out.jsonl")
    return {"streaming": True, "train": {"uri": train, "format": "text"}, "eval": {"uri": evaluated}, "maxLength": 64}


def test_a_stream_goes_on_where_it_was_when_a_pod_is_lost(
    tenant: Tenant, assets: Assets, model: dict[str, Any], streamed: dict[str, Any]
) -> None:
    """It ends with the model of a run that lost none."""
    edits = {"spec.model": model, "spec.data": streamed}
    tenant.apply(tiny_run("whole", assets, steps=STEPS, edits=edits))
    whole = tenant.until_phase("whole", Phase.SUCCEEDED)
    tenant.until_nothing_left()

    tenant.apply(tiny_run("broken", assets, steps=STEPS, edits=edits))
    tenant.until("a commit is told", lambda: (made := tenant.status("broken").checkpoints) and made.retained)
    tenant.kubectl("delete", "pod", workers(tenant)[0], "--force", "--grace-period=0", "--wait=false")
    broken = tenant.until_phase("broken", Phase.SUCCEEDED)
    assert lost(broken) == [FailureClass.WORKER_LOST]
    assert whole.evaluation is not None
    assert broken.evaluation is not None
    assert broken.evaluation.metrics == pytest.approx(whole.evaluation.metrics, abs=ROUNDING)
    assert not list(tenant.store("broken").list("tokens")), "shards are kept for as long as the run"
    tenant.until_nothing_left()


def test_samples_are_asked_for_by_the_template_of_a_config_map(
    tenant: Tenant, assets: Assets, model: dict[str, Any], bucket: Bucket, tmp_path: Path
) -> None:
    """On each rank it is the same, and the status says where the samples are."""
    template = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": TEMPLATE}}
    tenant.apply({**template, "data": {"chatml": tiny.CHATML_GENERATION}})
    chats = bucket.upload(tiny.dataset(tmp_path, "messages"), "assets/messages.jsonl")
    data = {
        "train": {"uri": chats, "format": "messages"},
        "evalFraction": 0.25,
        "maxLength": 64,
        "groupByLength": True,
        "chatTemplate": {"configMapRef": {"name": TEMPLATE, "key": "chatml"}},
    }
    samples = {"everySteps": 12, "samples": {"count": 3, "maxNewTokens": 8}}
    edits = {"spec.model": model, "spec.data": data, "spec.evaluation": samples}
    tenant.apply(tiny_run("chats", assets, steps=24, edits=edits))
    status = tenant.until_phase("chats", Phase.SUCCEEDED)
    assert status.evaluation is not None
    assert status.evaluation.samples is not None
    folder, _, name = status.evaluation.samples.rpartition("/")
    lines = (bucket.download(folder, tmp_path / "samples") / name).read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(prompts) == 3
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)
    tenant.until_nothing_left()
