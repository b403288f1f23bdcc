"""The chunked loss is the loss: same value, same gradients, also under ZeRO-3; and the whole logits are never there."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from dsft_trainer import chunked_loss
from dsft_trainer.data.tokens import IGNORED
from dsft_trainer.errors import TrainerError
from dsft_trainer.losses import causal_nll
from dsft_trainer.model_checks import check_chunked
from tests.trainer import tiny
from tests.trainer.runs import causal_lm
from tests.trainer.test_model_checks import SMALL
from tests.trainer.test_parity import job_of, torchrun

VOCABULARY = 50_000
TOKENS = 2048
CHUNK = 128


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_loss_and_gradients_are_those_of_whole_logits_under_zero3(tmp_path: Path) -> None:
    untied = tiny.llama(tmp_path / "untied")
    model = LlamaForCausalLM.from_pretrained(untied, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    document = causal_lm("chunks", untied, tiny.dataset(tmp_path, "text"), steps=10)
    (tmp_path / "job.json").write_text(job_of(document).to_json())
    torchrun("chunked_loss_ranks.py", str(tmp_path / "job.json"), str(tmp_path), str(untied), str(tmp_path / "tied"))
    for name in ("untied", "tied"):
        facts = json.loads((tmp_path / f"{name}.json").read_text())
        assert ("lm_head.weight" in facts["gradients"]) == (name == "untied")
        whole, by_chunks = facts["losses"]
        assert by_chunks == pytest.approx(whole, rel=1e-5)
        for largest, difference in facts["gradients"].values():
            assert largest > 0
            assert difference <= 1e-5 * max(1.0, largest)


class LargestTensor(TorchDispatchMode):
    """Watches what operators return."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *(tensor.numel() for tensor in tensors)])
        return result


def model_of(kind: str, **fields: object):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **fields}, use_cache=False)).eval()


def test_the_largest_tensor_is_one_chunk_and_not_the_logits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small chunk; beside one of the usual size the whole logits would have to be many gigabytes."""
    monkeypatch.setattr(chunked_loss, "chunk_tokens", lambda vocabulary: CHUNK)
    model = model_of("llama", vocab_size=VOCABULARY, hidden_size=16, max_position_embeddings=TOKENS)
    ids = torch.arange(TOKENS)[None]
    labels = torch.where(ids % 3 == 0, IGNORED, ids)
    with LargestTensor() as whole:
        expected = causal_nll(model(input_ids=ids).logits, labels)
        expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    chunked_loss.install(model)
    with LargestTensor() as by_chunks:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
    with capsys.disabled():
        print(f" largest tensor, forward and backward: {whole.numbers:,} numbers, {by_chunks.numbers:,} by chunks ")
    assert whole.numbers >= TOKENS * VOCABULARY
    assert by_chunks.numbers <= CHUNK * VOCABULARY
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for one, other in zip([p.grad for p in model.parameters()], gradients, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max()))


def check(model) -> None:
    chunked_loss.install(model)
    check_chunked(
        model, lambda inputs: model(**inputs).logits, lambda inputs, labels: model(**inputs, labels=labels).loss
    )


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("llama", {}), ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}), ("gemma2", {"final_logit_softcapping": 0.5})],
)
def test_models_with_a_linear_head_are_taken(kind: str, fields: dict[str, object]) -> None:
    check(model_of(kind, **fields))


@pytest.mark.parametrize(("kind", "fields"), [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.5})])
def test_models_that_change_their_logits_are_refused_by_name(kind: str, fields: dict[str, object]) -> None:
    with pytest.raises(TrainerError, match=rf"lossKernel chunked does not fit a model of type {kind}: it changes"):
        check(model_of(kind, **fields))
