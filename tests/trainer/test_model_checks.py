"""Models are asked whether they keep packed rows apart, and those that do lose nothing by packing; what is missing is refused."""

from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import ModelSpec
from dsft_trainer.data.collate import Batch, Collator
from dsft_trainer.data.indexed import IndexedDataset, open_indexed, write_indexed
from dsft_trainer.data.packing import pack
from dsft_trainer.data.tokens import IGNORED
from dsft_trainer.engine import Engine
from dsft_trainer.errors import TrainerError
from dsft_trainer.losses import causal_nll
from dsft_trainer.model import load_model
from dsft_trainer.model_checks import check_kept_apart, check_model
from tests.trainer.runs import causal_lm, first_attempt

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
# type of the model, its own fields, attention
APART = [
    ("llama", {}, "sdpa"),
    ("llama", {}, "eager"),
    ("mistral", {"sliding_window": 5}, "sdpa"),
    ("qwen2", {}, "sdpa"),
    ("qwen3", {"head_dim": 8}, "eager"),
    ("gemma2", {"head_dim": 8, "sliding_window": 5}, "eager"),
    ("gemma3_text", {"head_dim": 8, "sliding_window": 5}, "sdpa"),
    ("phi3", {}, "sdpa"),
    ("gpt_neox", {}, "sdpa"),
    ("gpt2", GPT2, "sdpa"),
    ("gpt2", GPT2, "eager"),
    ("mixtral", {}, "sdpa"),
]
MIXING = [
    ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, "sdpa"),
    ("bloom", {"n_layer": 2, "n_head": 4}, "eager"),
    ("falcon", {"alibi": True}, "sdpa"),
    ("mamba", {}, "eager"),
    ("jamba", {}, "sdpa"),
]


def model_of(kind: str, fields: dict[str, object], attention: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **fields}, use_cache=False)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()


def check(model) -> None:
    check_kept_apart(model, lambda inputs: model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "fields", "attention"), APART)
def test_models_that_keep_rows_apart_are_taken(kind, fields, attention, dtype):
    check(model_of(kind, fields, attention, dtype))


@pytest.mark.parametrize(("kind", "fields", "attention"), MIXING)
def test_models_that_mix_rows_are_refused_by_name(kind, fields, attention):
    with pytest.raises(TrainerError, match=rf"spec\.data\.packing: a model of type {kind} does not keep") as raised:
        check(model_of(kind, fields, attention))
    assert raised.value.failure_class is FailureClass.CONFIG_INVALID


def rows_of(count: int) -> pa.Table:
    rng = np.random.default_rng(3)
    ids = [rng.integers(3, 128, length).astype(np.int32) for length in rng.integers(2, 30, count)]
    labels = [np.where(np.arange(len(row)) < len(row) // 3, IGNORED, row).astype(np.int32) for row in ids]
    kind = pa.list_(pa.int32())
    weights = pa.array([int((row[1:] != IGNORED).sum()) for row in labels], pa.int64())
    return pa.table({"input_ids": pa.array(ids, kind), "labels": pa.array(labels, kind), "weight": weights})


def opened(table: pa.Table, path) -> IndexedDataset:
    write_indexed([table], path)
    return open_indexed(path)


def batches(data: IndexedDataset, size: int) -> list[Batch]:
    collator = Collator(pad_token_id=0, task="causal-lm", max_length=64)
    return [
        collator([data[at] for at in range(start, min(start + size, len(data)))]) for start in range(0, len(data), size)
    ]


def summed(model, parts: list[Batch]) -> tuple[float, int, list[torch.Tensor]]:
    """Loss, weight and gradients of all batches together."""
    model.zero_grad()
    losses = [causal_nll(model(**batch.inputs).logits, batch.labels) for batch in parts]
    total = torch.stack(losses).sum()
    total.backward()
    return float(total), sum(batch.weight for batch in parts), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("kind", "fields", "attention"), APART)
def test_packed_rows_have_the_loss_and_the_gradients_of_rows_alone(kind, fields, attention, tmp_path):
    model = model_of(kind, fields, attention)
    rows = rows_of(24)
    packed = opened(pack(rows, 64), tmp_path / "packed.arrow")
    assert len(packed) < 12
    alone = summed(model, batches(opened(rows, tmp_path / "rows.arrow"), 1))
    together = summed(model, batches(packed, 3))
    assert together[0] == pytest.approx(alone[0], rel=1e-6)
    assert together[1] == alone[1]
    for one, other in zip(together[2], alone[2], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()) + 1e-7)


def test_the_logits_of_a_row_do_not_depend_on_its_neighbours():
    model = model_of("llama", {}, "sdpa")
    row, position = torch.arange(3, 9), torch.arange(6)
    seen = []
    for neighbour in (torch.arange(20, 30), torch.arange(60, 70)):
        ids = torch.cat([neighbour, row, neighbour])[None]
        positions = torch.cat([torch.arange(10), position, torch.arange(10)])[None]
        seen.append(model(input_ids=ids, position_ids=positions).logits[0, 10:16])
    alone = model(input_ids=row[None]).logits[0]
    assert torch.equal(*seen)
    assert torch.allclose(seen[0], alone, atol=1e-6)


def test_samples_of_a_model_that_cannot_generate_are_refused() -> None:
    class Mute(LlamaForCausalLM):
        """Code of its own that a model brings, without transformers' generation."""

        @classmethod
        def can_generate(cls) -> bool:
            return False

    document = causal_lm("mute", Path("/model"), Path("/text"), steps=1)["spec"]
    document |= {"evaluation": {"samples": {}}}
    with pytest.raises(TrainerError, match=r"spec\.evaluation\.samples: a model of type llama cannot generate"):
        check_model(first_attempt(document).spec, cast("Engine", None), Mute(LlamaConfig(**SMALL)))


def test_samples_longer_than_the_model_are_refused() -> None:
    document = causal_lm("long", Path("/model"), Path("/text"), steps=1)["spec"]
    document |= {"evaluation": {"samples": {"maxNewTokens": 128}}}
    with pytest.raises(
        TrainerError, match=r"maxNewTokens 128 leaves no room for a prompt in the model's 128 positions"
    ):
        check_model(first_attempt(document).spec, cast("Engine", None), LlamaForCausalLM(LlamaConfig(**SMALL)))


def test_flash_attention_without_its_package_is_refused(tmp_path: Path) -> None:
    """What it computes needs a GPU to be seen."""
    with pytest.raises(TrainerError, match=r"flash_attention_2 needs a GPU and the package flash-attn"):
        load_model(
            ModelSpec(uri="file:///m", task="causal-lm"),
            tmp_path,
            {},
            precision="bf16",
            attention="flash_attention_2",
            activation_checkpointing=False,
            pad_token_id=0,
        )
