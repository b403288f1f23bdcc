"""Which tokens are trained, for six families of chat templates: token by token, with and without `{% generation %}`.

« and » are the places of the marks. In the tables trained tokens stand in [brackets], and a line break is \\n. Each token is a
word, a sign or a line break, so that a table can be read against the template.
"""

import re
from dataclasses import dataclass

import pyarrow as pa
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsft_api.spec.identity import DataSpec
from dsft_trainer.data.tokens import IGNORED, Encoder, tokenize

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "A crew."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "At sea."},
]
WORDS = [
    "\n",
    "Be",
    "brief",
    ".",
    "Who",
    "?",
    "A",
    "crew",
    "Where",
    "At",
    "sea",
    "system",
    "user",
    "assistant",
    "model",
]


@dataclass(frozen=True)
class Family:
    """A template in the manner of a family, and the tokens that it writes."""

    template: str
    marked: str
    unmarked: str
    special: tuple[str, ...]
    bos: str | None = None
    eos: str | None = None

    def tokenizer(self, *, marks: bool) -> PreTrainedTokenizerFast:
        words = {word: number for number, word in enumerate(["<unk>", *WORDS])}
        made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
        made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.special])
        wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=self.bos, eos_token=self.eos)
        begin, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
        wrapped.chat_template = self.template.replace("«", begin).replace("»", end)
        return wrapped


CHATML = Family(
    template="{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}«{{ m.content }}<|im_end|>»{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    special=("<|im_start|>", "<|im_end|>"),
    marked=r"""
        <|im_start|> system \n Be brief . <|im_end|> \n <|im_start|> user \n Who ? <|im_end|> \n
        <|im_start|> assistant \n [A crew . <|im_end|>] \n <|im_start|> user \n Where ? <|im_end|> \n
        <|im_start|> assistant \n [At sea . <|im_end|>] \n""",
    unmarked=r"""
        <|im_start|> system \n Be brief . <|im_end|> \n <|im_start|> user \n Who ? <|im_end|> \n
        <|im_start|> assistant \n [A crew . <|im_end|> \n] <|im_start|> user \n Where ? <|im_end|> \n
        <|im_start|> assistant \n [At sea . <|im_end|> \n]""",
)
LLAMA_3 = Family(
    template="{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' }}"
    "{% if m.role == 'assistant' %}«{{ m.content }}<|eot_id|>»{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}",
    special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    marked=r"""
        <|begin_of_text|> <|start_header_id|> system <|end_header_id|> \n \n Be brief . <|eot_id|>
        <|start_header_id|> user <|end_header_id|> \n \n Who ? <|eot_id|>
        <|start_header_id|> assistant <|end_header_id|> \n \n [A crew . <|eot_id|>]
        <|start_header_id|> user <|end_header_id|> \n \n Where ? <|eot_id|>
        <|start_header_id|> assistant <|end_header_id|> \n \n [At sea . <|eot_id|>]""",
    unmarked=r"""
        <|begin_of_text|> <|start_header_id|> system <|end_header_id|> \n \n Be brief . <|eot_id|>
        <|start_header_id|> user <|end_header_id|> \n \n Who ? <|eot_id|>
        <|start_header_id|> assistant <|end_header_id|> \n \n [A crew . <|eot_id|>]
        <|start_header_id|> user <|end_header_id|> \n \n Where ? <|eot_id|>
        <|start_header_id|> assistant <|end_header_id|> \n \n [At sea . <|eot_id|>]""",
)
# The system's message opens the first question; an answer follows at once, without words that announce it.
MISTRAL = Family(
    template="{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system }}{{ m.content }} [/INST]{% set ns.system = '' %}"
    "{% else %}« {{ m.content }}{{ eos_token }}»{% endif %}{% endfor %}",
    special=("<s>", "</s>", "[INST]", "[/INST]"),
    bos="<s>",
    eos="</s>",
    marked=r"""
        <s> _INST_ Be brief . \n \n Who ? _/INST_ [A crew . </s>] _INST_ Where ? _/INST_ [At sea . </s>]""",
    unmarked=r"""
        <s> _INST_ Be brief . \n \n Who ? _/INST_ [A crew . </s>] _INST_ Where ? _/INST_ [At sea . </s>]""",
)
# There is no system: what it says opens the first turn. The assistant is called model.
GEMMA = Family(
    template="{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}<start_of_turn>user\n{{ ns.system }}{{ m.content }}<end_of_turn>{{ '\n' }}"
    "{% set ns.system = '' %}{% else %}<start_of_turn>model\n«{{ m.content }}<end_of_turn>»{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    special=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    bos="<bos>",
    marked=r"""
        <bos> <start_of_turn> user \n Be brief . \n \n Who ? <end_of_turn> \n
        <start_of_turn> model \n [A crew . <end_of_turn>] \n <start_of_turn> user \n Where ? <end_of_turn> \n
        <start_of_turn> model \n [At sea . <end_of_turn>] \n""",
    unmarked=r"""
        <bos> <start_of_turn> user \n Be brief . \n \n Who ? <end_of_turn> \n
        <start_of_turn> model \n [A crew . <end_of_turn> \n] <start_of_turn> user \n Where ? <end_of_turn> \n
        <start_of_turn> model \n [At sea . <end_of_turn> \n]""",
)
# The end of the sequence comes after the last turn only.
PHI = Family(
    template="{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}«{{ m.content }}<|end|>»{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    eos="<|endoftext|>",
    marked=r"""
        <|system|> \n Be brief . <|end|> \n <|user|> \n Who ? <|end|> \n <|assistant|> \n [A crew . <|end|>] \n
        <|user|> \n Where ? <|end|> \n <|assistant|> \n [At sea . <|end|>] \n <|endoftext|>""",
    unmarked=r"""
        <|system|> \n Be brief . <|end|> \n <|user|> \n Who ? <|end|> \n <|assistant|> \n [A crew . <|end|> \n]
        <|user|> \n Where ? <|end|> \n <|assistant|> \n [At sea . <|end|> \n <|endoftext|>]""",
)
ZEPHYR = Family(
    template="{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}«{{ m.content + eos_token }}»{% else %}{{ m.content + eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    special=("<|system|>", "<|user|>", "<|assistant|>", "</s>"),
    eos="</s>",
    marked=r"""
        <|system|> \n Be brief . </s> \n <|user|> \n Who ? </s> \n <|assistant|> \n [A crew . </s>] \n
        <|user|> \n Where ? </s> \n <|assistant|> \n [At sea . </s>] \n""",
    unmarked=r"""
        <|system|> \n Be brief . </s> \n <|user|> \n Who ? </s> \n <|assistant|> \n [A crew . </s> \n]
        <|user|> \n Where ? </s> \n <|assistant|> \n [At sea . </s> \n]""",
)
FAMILIES = {
    "ChatML": CHATML,
    "Llama 3": LLAMA_3,
    "Mistral": MISTRAL,
    "Gemma": GEMMA,
    "Phi": PHI,
    "Zephyr": ZEPHYR,
}


def table_of(text: str) -> list[tuple[str, bool]]:
    """(token, trained) of a table as it is written above; _INST_ is a token that has brackets of its own."""
    rows, inside = [], False
    for word in text.split():
        token = re.sub(r"^\[|\]$", "", word)
        inside = inside or word.startswith("[")
        rows.append((re.sub(r"^_(/?INST)_$", r"[\1]", token).replace(r"\n", "\n"), inside))
        inside = inside and not word.endswith("]")
    return rows


def tokens_of(family: Family, *, marks: bool) -> list[tuple[str, bool]]:
    tokenizer = family.tokenizer(marks=marks)
    data = DataSpec.model_validate({"train": {"uri": "file:///data", "format": "messages"}})
    encoder = Encoder.of(data.train, data, tokenizer)
    (row,) = tokenize(pa.table({"messages": [CONVERSATION]}), encoder).to_pylist()
    trained = [label != IGNORED for label in row["labels"]]
    return list(zip(tokenizer.convert_ids_to_tokens(row["input_ids"]), trained, strict=True))


@pytest.mark.parametrize("marks", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_trained_tokens_of_a_family(name: str, marks: bool) -> None:
    family = FAMILIES[name]
    assert tokens_of(family, marks=marks) == table_of(family.marked if marks else family.unmarked)


def test_a_table_is_read_as_it_is_written() -> None:
    assert table_of(r"<s> _INST_ a _/INST_ [b \n] c [d]") == [
        ("<s>", False),
        ("[INST]", False),
        ("a", False),
        ("[/INST]", False),
        ("b", True),
        ("\n", True),
        ("c", False),
        ("d", True),
    ]
