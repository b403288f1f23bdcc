"""What the sizes of a model are taken from config.json to be, against the model itself; and a plan against a run."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from dsft_api.spec.identity import LoraSpec, ModelSpec
from dsft_trainer.errors import TrainerError
from dsft_trainer.lora import add_adapters
from dsft_trainer.sizing import model_size
from tests.bench import plan as bench
from tests.trainer import tiny

LENGTH = 64


def built(folder: Path, task: str) -> tuple[PreTrainedModel, ModelSpec]:
    """The model with its weights, and as the manifest names it."""
    if task == "causal-lm":
        model = AutoModelForCausalLM.from_pretrained(tiny.llama(folder))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(tiny.bert(folder, num_labels=3), num_labels=3)
    labels = {} if task == "causal-lm" else {"num_labels": 3}
    return model, ModelSpec.model_validate({"uri": folder.as_uri(), "task": task, **labels})


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_the_config_alone_tells_all_tensors_and_what_autograd_keeps(tmp_path: Path, task: str) -> None:
    model, spec = built(tmp_path / "model", task)
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    size = model_size(spec, tmp_path / "model", precision="fp32", attention="sdpa", length=LENGTH)
    assert size.trainable == Counter(p.numel() for p in model.parameters())
    assert size.layers == model.config.num_hidden_layers
    model.train()
    kept: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        row = torch.ones((1, LENGTH), dtype=torch.long)
        logits = model(input_ids=row, attention_mask=row).logits
    assert size.logits_per_row == logits.numel()
    assert size.activation_row_bytes == pytest.approx(
        sum(t.untyped_storage().nbytes() for t in kept.values()), rel=0.15
    )
    assert size.recomputed_row_bytes < size.activation_row_bytes / 2


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_counted(tmp_path: Path, task: str, use_dora: bool) -> None:
    model, spec = built(tmp_path / "model", task)
    lora = LoraSpec(rank=4, use_dora=use_dora)
    size = model_size(spec, tmp_path / "model", precision="fp32", attention="sdpa", length=LENGTH, lora=lora)
    parameters = list(add_adapters(model, lora, spec).parameters())
    assert size.trainable == Counter(p.numel() for p in parameters if p.requires_grad)
    assert size.frozen == Counter(p.numel() for p in parameters if not p.requires_grad)


def test_a_config_of_no_known_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    spec = ModelSpec.model_validate({"uri": tmp_path.as_uri(), "task": "causal-lm"})
    with pytest.raises(TrainerError, match="cannot be built for causal-lm"):
        model_size(spec, tmp_path, precision="bf16", attention="sdpa", length=LENGTH)


@pytest.mark.slow
@pytest.mark.timeout(bench.SECONDS)
def test_a_plan_holds_for_a_run(tmp_path: Path) -> None:
    bench.make(tmp_path)
    rows = bench.rows_of(tmp_path, bench.spec_of(tmp_path, "bf16", microBatchSize=4))
    assert [row for row in rows if not row.holds] == [], bench.table(rows)
