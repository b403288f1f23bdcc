"""Conversations -> token ids, and which of them the assistant said.

A template that marks them with `{% generation %}` says it itself. For the many that do not, a turn is what the rendered
text gains over the conversation before it (with the generation prompt). That holds only if each is a prefix of the next,
which is checked, since some templates drop earlier reasoning.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jinja2.exceptions import TemplateError

from dsft_api.conditions import FailureClass
from dsft_trainer.errors import TrainerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def require_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise DataInvalid if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise TrainerError(
            FailureClass.DATA_INVALID,
            "the data has format messages, but the model's tokenizer has no chat template",
            "set spec.data.chatTemplate.fromModel to the instruct model of the same family, or chatTemplate.template",
        )


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[list[Message]],
    *,
    only_assistant: bool,
    first_row: int,
    field: str,
) -> list[tuple[list[int], list[bool]]]:
    """(token ids, trained) of each conversation, in full length. The template writes all special tokens.

    Raises:
        TrainerError: DataInvalid, naming the row, if the template refuses it, or hides what the assistant said.
    """
    texts: list[str] = []
    spans: list[list[Span]] = []
    for number, messages in enumerate(conversations, start=first_row):
        try:
            text, said = _render(tokenizer, messages)
            if only_assistant and not _GENERATION.search(tokenizer.get_chat_template()):
                said = _turns(tokenizer, messages, text)
        except (TemplateError, TypeError, ValueError) as error:
            raise TrainerError(
                FailureClass.DATA_INVALID,
                f"row {number} of {field}: the chat template cannot render it: {error}",
                "correct the row, or set another spec.data.chatTemplate",
            ) from error
        if said is None:
            raise TrainerError(
                FailureClass.DATA_INVALID,
                f"row {number} of {field}: the chat template rewrites earlier turns, so what the assistant said"
                " cannot be told apart",
                "mark it with {% generation %} in spec.data.chatTemplate.template, or set spec.data.lossOn: all",
            )
        texts.append(text)
        spans.append(said if only_assistant else [(0, len(text))])
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    return [
        (ids, _inside(offsets, said))
        for ids, offsets, said in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
    ]


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], *, to_be_continued: bool = False
) -> tuple[str, list[Span]]:
    """The text of a conversation, and the `{% generation %}` spans of it in characters."""
    # One step below apply_chat_template(return_assistant_tokens_mask=True), which marks all that follows a turn if the
    # tokenizer's offsets leave out the turn's last character (byte-level BPE does that to whitespace).
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[_written(messages)],
        chat_template=tokenizer.get_chat_template(),
        add_generation_prompt=to_be_continued,
        return_assistant_tokens_mask=bool(_GENERATION.search(tokenizer.get_chat_template())),
        **tokenizer.special_tokens_map,
    )
    return texts[0], spans[0] if spans else []


def _written(value: Any) -> Any:
    """A value of a row as its file has it: Arrow gives each message, and each argument of a tool, the keys of all of them."""
    if isinstance(value, dict):
        members = cast("dict[str, Any]", value)
        return {key: _written(member) for key, member in members.items() if member is not None}
    if isinstance(value, list):
        return [_written(item) for item in cast("list[Any]", value)]
    return value


def _turns(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], text: str) -> list[Span] | None:
    """What each assistant message adds to the text; None if the text before it is no prefix of the text after it."""
    spans: list[Span] = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:position], to_be_continued=True)[0] if position else ""
        after = _render(tokenizer, messages[: position + 1])[0]
        if not text.startswith(after):
            # Some templates write the end of the sequence after the last turn only.
            after = after.removesuffix(str(tokenizer.eos_token))
        if not (after.startswith(before) and text.startswith(after)):
            return None
        spans.append((len(before), len(after)))
    return spans


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token lies in one of the character spans, boundary tokens included."""
    begin, end = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(begin), dtype=bool)
    for start, stop in spans:
        # Tokens without characters of their own belong to the turn that they stand in.
        touching = np.flatnonzero((begin < stop) & (end > start) & (end > begin))
        if touching.size:
            mask[touching[0] : touching[-1] + 1] = True
    return mask.tolist()
