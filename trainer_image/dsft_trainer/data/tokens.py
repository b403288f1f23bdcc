"""Rows -> token ids and what to train on, row by row, with the model's own tokenizer.

The result depends on the row and the tokenizer alone, so it is the same whoever computes it, in whatever portions. A
row with nothing to train on is an error: it would take a place in a batch and teach nothing.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dsft_api.conditions import FailureClass
from dsft_api.job import CHAT_TEMPLATE_ENV, Job
from dsft_api.spec.identity import DataFormat, DatasetSource, DataSpec
from dsft_api.spec.placement import StorageSpec
from dsft_trainer.data import chat, formats, sources
from dsft_trainer.errors import TrainerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not trained on (`ignore_index` of PyTorch's cross entropy)."""

# Rows per call of the tokenizer: enough to keep its threads busy, few enough to hold as Python lists.
ROWS_PER_CALL = 1000

Tokens = list[int]


@dataclass(frozen=True)
class Encoder:
    """Everything that decides how a row becomes tokens. Can be pickled."""

    tokenizer: "PreTrainedTokenizerBase"
    data_format: DataFormat
    loss_on: formats.LossOn | None
    max_length: int
    field: str = formats.TRAIN_FIELD

    @classmethod
    def of(
        cls,
        source: DatasetSource,
        data: DataSpec,
        tokenizer: "PreTrainedTokenizerBase",
        field: str = formats.TRAIN_FIELD,
    ) -> "Encoder":
        """The encoder of one data set. For messages the tokenizer needs a chat template (`set_chat_template`).

        Raises:
            TrainerError: DataInvalid if it has none; ModelDenied if it lacks what the format needs.
        """
        if source.format == "messages":
            chat.require_template(tokenizer)
        if source.format in ("text", "prompt_completion") and tokenizer.eos_token_id is None:
            raise TrainerError(
                FailureClass.MODEL_DENIED,
                f"the tokenizer has no end-of-sequence token, which {field}.format {source.format} puts after each row",
                "add eos_token to the model's tokenizer_config.json, or use format messages",
            )
        return cls(tokenizer, source.format, formats.loss_on(source, data), data.max_length, field)

    def encode(self, rows: pa.Table, first_row: int = 0) -> pa.Table:
        """Tokens of some rows, as `tokenize`; `first_row` is the number of the first one in the data set, for errors."""
        if formats.FORMATS[self.data_format].task == "sequence-classification":
            return self._encode_labelled(rows)
        match self.data_format:
            case "text":
                pairs = [self._text(ids) for ids in self._ids(rows["text"].to_pylist())]
            case "prompt_completion":
                pairs = self._prompt_completion(rows)
            case _:
                pairs = chat.encode(
                    self.tokenizer,
                    rows["messages"].to_pylist(),
                    only_assistant=self.loss_on == "assistant",
                    first_row=first_row,
                    field=self.field,
                )
        tokens = self._causal_table(pairs)
        self._require_trained(tokens, first_row)
        return tokens

    def _encode_labelled(self, rows: pa.Table) -> pa.Table:
        texts = [rows[name].to_pylist() for name in ("text", "text_pair") if name in rows.column_names]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        columns = {name: pa.array(encoded[name], pa.list_(pa.int32())) for name in names}
        label = pa.chunked_array(rows["label"].chunks, rows["label"].type).cast(pa.int64())
        return pa.table({**columns, "label": label, "weight": np.ones(rows.num_rows, np.int64)})

    def _causal_table(self, pairs: Sequence[tuple[Tokens, Sequence[bool]]]) -> pa.Table:
        ids = [tokens[: self.max_length] for tokens, _ in pairs]
        labels = [
            [token if trained else IGNORED for token, trained in zip(tokens, mask, strict=False)]
            for tokens, (_, mask) in zip(ids, pairs, strict=True)
        ]
        # The model predicts each token from those before it, so the first one is never a target.
        weights = [sum(label != IGNORED for label in row[1:]) for row in labels]
        tokens = pa.list_(pa.int32())
        return pa.table(
            {
                "input_ids": pa.array(ids, tokens),
                "labels": pa.array(labels, tokens),
                "weight": pa.array(weights, pa.int64()),
            }
        )

    def _require_trained(self, tokens: pa.Table, first_row: int) -> None:
        row = pc.index(tokens["weight"], value=0).as_py()
        if row < 0:
            return
        length = len(tokens["input_ids"][row])
        is_cut = length == self.max_length
        raise TrainerError(
            FailureClass.DATA_INVALID,
            f"row {first_row + row} of {self.field} has nothing to train on in its"
            f" {'first ' if is_cut else ''}{length} tokens",
            f"raise spec.data.maxLength from {self.max_length}, or drop the row" if is_cut else "drop the row",
        )

    def _text(self, ids: Tokens) -> tuple[Tokens, list[bool]]:
        tokens = [*self._bos, *ids, self.tokenizer.eos_token_id]
        return tokens, [True] * len(tokens)

    def _prompt_completion(self, rows: pa.Table) -> list[tuple[Tokens, list[bool]]]:
        # Tokenised apart, as at inference, where the prompt is all there is.
        prompts = self._ids(rows["prompt"].to_pylist())
        completions = self._ids(rows["completion"].to_pylist())
        pairs = []
        for prompt, completion in zip(prompts, completions, strict=True):
            given = [*self._bos, *prompt]
            learnt = [*completion, self.tokenizer.eos_token_id]
            pairs.append((given + learnt, [self.loss_on == "all"] * len(given) + [True] * len(learnt)))
        return pairs

    def _ids(self, texts: list[str]) -> list[Tokens]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    @property
    def _bos(self) -> Tokens:
        """The beginning-of-sequence token, if this tokenizer starts a sequence with one."""
        around_nothing = self.tokenizer("")["input_ids"]
        return around_nothing[:1] if around_nothing[:1] == [self.tokenizer.bos_token_id] else []


def tokenize(table: pa.Table, encoder: Encoder) -> pa.Table:
    """Tokens of all rows, in the order of the rows, cut to `max_length`.

    Columns: `input_ids` list<int32>; `token_type_ids` if the tokenizer makes them; for causal-lm `labels` list<int32>,
    IGNORED where not trained, not yet shifted; for classification `label` int64; and `weight` int64, what the row
    counts in the loss: its trained tokens after the causal shift, or 1.

    Raises:
        TrainerError: DataInvalid, naming the row, if a row has no trained tokens or its chat template fails.
    """
    starts = range(0, table.num_rows, ROWS_PER_CALL)
    return pa.concat_tables([encoder.encode(table.slice(start, ROWS_PER_CALL), start) for start in starts])


def set_chat_template(tokenizer: "PreTrainedTokenizerBase", job: Job, cache: Path) -> None:
    """Give the tokenizer the manifest's chat template, if it names one; the exported tokenizer then carries it too.

    That of a model on the Hub is taken from the commit that `pins` found.

    Raises:
        TrainerError: ModelDenied if the model that should carry it has none; what `template_of_config_map` raises.
    """
    template = job.spec.workload().data.chat_template
    if template is None:
        return
    if template.config_map_ref is not None:
        tokenizer.chat_template = template_of_config_map(job.resolved.template_digest if job.resolved else None)
        return
    if template.template is not None:
        tokenizer.chat_template = template.template
        return
    revision = job.resolved.template_revision if job.resolved else None
    tokenizer.chat_template = _template_of(str(template.model_uri), revision, job.spec.storage, cache)


def template_of_config_map(known: str | None) -> str:
    """What the pod was given of `chatTemplate.configMapRef`; `known` is the digest of what the run began with.

    Raises:
        TrainerError: ConfigInvalid where there is nothing: outside a cluster, or of an empty key. DataInvalid if it is another
            template: pods that came later than the others may have that.
    """
    template = os.environ.get(CHAT_TEMPLATE_ENV)
    if not template:
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            "spec.data.chatTemplate.configMapRef: there is no ConfigMap here, or its key is empty",
            "without a cluster, write the template into spec.data.chatTemplate.template",
        )
    digest = digest_of_template(template)
    if known and digest != known:
        raise TrainerError(
            FailureClass.DATA_INVALID,
            f"the chat template of the ConfigMap is not what the run began with: its digest is {digest}, and was {known}",
            "put it back as it was, or start a new run on the new one",
        )
    return template


def digest_of_template(template: str) -> str:
    """`sha256:...` of a template's text."""
    return f"sha256:{hashlib.sha256(template.encode()).hexdigest()}"


def _template_of(uri: str, revision: str | None, storage: StorageSpec, cache: Path) -> str | dict[str, str]:
    from transformers import AutoTokenizer

    folder = sources.fetch(uri, storage=storage, cache=cache, kind="tokenizer", revision=revision)
    try:
        template = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).chat_template
    except (OSError, ValueError) as error:
        raise TrainerError(
            FailureClass.MODEL_DENIED, f"no tokenizer in {uri}: {str(error).splitlines()[0]}", "check chatTemplate"
        ) from error
    if template is None:
        raise TrainerError(
            FailureClass.MODEL_DENIED,
            f"the tokenizer of spec.data.chatTemplate.fromModel {uri} has no chat template",
            "name an instruct or chat model, or write the template into spec.data.chatTemplate.template",
        )
    return template
