"""What the model writes after the prompts of a few evaluation rows: metrics tell that it learns, texts what.

Every rank writes the same texts, since ZeRO-3 gathers weights in each forward pass. Always the likeliest token is taken: no
random generator is touched, and the texts of two evaluations can be compared.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dsft_api.spec.identity import SamplesSpec
from dsft_trainer import collectives
from dsft_trainer.data.indexed import IndexedDataset, Row
from dsft_trainer.data.tokens import IGNORED
from dsft_trainer.engine import Engine

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One text, of the evaluation row with this number; `expected` is what the row has in its place."""

    row: int
    prompt: str
    completion: str
    expected: str

    def to_wire(self) -> dict[str, int | str]:
        """As a line of the file has it."""
        return asdict(self)


def split_row(row: Row) -> tuple[Tokens, Tokens]:
    """(prompt, expected): what comes before the first trained part of a row, and that part.

    Of a row that is trained from its beginning, the first half is the prompt.
    """
    ids, trained = row["input_ids"].astype(np.int64), row["labels"] != IGNORED
    begin = int(trained.argmax())
    if begin == 0:
        begin = max(1, len(ids) // 2)
    untrained = np.flatnonzero(~trained[begin:])
    end = begin + int(untrained[0]) if len(untrained) else len(ids)
    return ids[:begin], ids[begin:end]


class SampleWriter:
    """Writes the samples of one evaluation data set."""

    def __init__(
        self,
        dataset: IndexedDataset,
        tokenizer: PreTrainedTokenizerBase,
        spec: SamplesSpec,
        *,
        batch_size: int,
        beat: Callable[[], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self._beat = beat
        numbers = np.unique(np.linspace(0, len(dataset) - 1, spec.count).astype(np.int64)).tolist()
        rows = [(number, *split_row(dataset[number])) for number in numbers]
        self._batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]

    def __call__(self, engine: Engine, stop: Callable[[], bool]) -> list[Sample]:
        """The samples, equal on all ranks; none if any rank was told to `stop` meanwhile. Collective."""
        engine.eval()
        samples: list[Sample] = []
        for batch in self._batches:
            if collectives.all_sum([float(stop())], engine.device)[0] > 0:
                samples = []
                break
            written = self._write(engine, [prompt for _, prompt, _ in batch])
            for (number, prompt, expected), ids in zip(batch, written, strict=True):
                samples.append(Sample(number, self._text(prompt, special=True), self._text(ids), self._text(expected)))
        engine.train()
        return samples

    def _write(self, engine: Engine, prompts: list[Tokens]) -> torch.Tensor:
        """New tokens after each of the prompts, which are padded on the left."""
        if positions := getattr(engine.model.config, "max_position_embeddings", None):
            # The end of a prompt, so that there is room for the text. `check_model` has seen that there is some.
            prompts = [prompt[-(positions - self._spec.max_new_tokens) :] for prompt in prompts]
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), self._filler, dtype=np.int64)
        mask = np.zeros_like(ids)
        for line, seen, prompt in zip(ids, mask, prompts, strict=True):
            line[width - len(prompt) :] = prompt
            seen[width - len(prompt) :] = 1
        with torch.no_grad():
            written = engine.model.generate(
                input_ids=torch.from_numpy(ids).to(engine.device),
                attention_mask=torch.from_numpy(mask).to(engine.device),
                generation_config=self._config(engine.model),
                stopping_criteria=[self._beat_on],
                # A rank that is done earlier, by rounding, goes on until all are.
                synced_gpus=True,
            )
        return written[:, width:]

    def _config(self, model: Any) -> GenerationConfig:
        own = getattr(model, "generation_config", None)
        ends = own.eos_token_id if own is not None else None
        listed = ends if isinstance(ends, list) else [ends]
        known = {end for end in (*listed, self._tokenizer.eos_token_id) if end is not None}
        return GenerationConfig(
            # Said all of them, since transformers takes what is not from the model's own configuration.
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            return_dict_in_generate=False,
            max_new_tokens=self._spec.max_new_tokens,
            eos_token_id=sorted(known) or None,
            pad_token_id=self._filler,
            use_cache=True,
        )

    @property
    def _filler(self) -> int:
        return next(
            token for token in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0) if token is not None
        )

    def _beat_on(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self._beat()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def _text(self, ids: Tokens | torch.Tensor, *, special: bool = False) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not special))
