"""Offline assets for trainer tests: models of a few thousand weights, a tokenizer, and data sets that can be learnt.

Nothing is downloaded, and everything is the same on each call, so losses can be compared between runs.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from dsft_api.spec.identity import DataFormat

TEXT = """
A ship in port is safe, but that is not what ships are built for. The sea was calm in the morning, and the wind came from
the west. The captain asked the crew to check the ropes, the sails and the water. Every sailor knew the work, and every rope
had its place. By noon the clouds were dark; by evening the rain was heavy, and the waves were high. The ship went on. She
was old, but she was sound. In the night the light of the harbour was seen, first as a spark, then as a star, and then as a
lamp on a hill. What is the way home? It is the way that you know. What is good weather? It is the weather after rain.
"""

# Marks assistant turns itself, or leaves that to whoever reads the text. Both give the same text.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SUBJECTS = ("ship", "captain", "crew", "harbour", "rope", "lamp", "wind", "rain")


def tokenizer(*, chat_template: str | None = None, classifier: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 tokens. A causal one begins with <s>; a classifier's makes <s> a </s> b </s>."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    around = [("<s>", 1), ("</s>", 2)]
    bpe.post_processor = (
        processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=around)
        if classifier
        else processors.TemplateProcessing(single="<s> $A", special_tokens=around)
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", *(["token_type_ids"] if classifier else []), "attention_mask"],
    )
    wrapped.chat_template = chat_template
    return wrapped


def llama(folder: Path, *, chat_template: str | None = None) -> Path:
    """A random causal-lm of 2 layers x 64 with its tokenizer, in `folder`."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


def bert(folder: Path, *, num_labels: int = 2) -> Path:
    """A random sequence classifier of 2 layers x 64, without dropout, with its tokenizer, in `folder`."""
    set_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        num_labels=num_labels,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer(classifier=True).save_pretrained(folder)
    return folder


def rows(data_format: DataFormat, count: int, *, num_labels: int = 2) -> list[dict[str, Any]]:
    """Rows of a format, of varying length, with something to learn: the label follows from the words."""
    return [_row(data_format, number, num_labels) for number in range(count)]


def _row(data_format: DataFormat, number: int, num_labels: int) -> dict[str, Any]:
    subject = _SUBJECTS[number % len(_SUBJECTS)]
    other = _SUBJECTS[number // len(_SUBJECTS) % len(_SUBJECTS)]
    sentence = f"The {subject} was seen " + "by the sea " * (number % 5) + "in the morning."
    label = number % len(_SUBJECTS) % num_labels
    match data_format:
        case "classification":
            return {"text": sentence, "label": label}
        case "pair":
            return {"text": sentence, "textPair": f"What is the {other}?", "label": label}
        case "text":
            return {"text": sentence}
        case "prompt_completion":
            return {"prompt": f"What is the {subject}? ", "completion": sentence}
        case "messages":
            question = {"role": "user", "content": f"What is the {subject}?"}
            return {"messages": [question, {"role": "assistant", "content": sentence}] * (1 + number % 2)}


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    """One JSON object a line; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def dataset(folder: Path, data_format: DataFormat, count: int = 64, *, num_labels: int = 2) -> Path:
    """`rows` in `folder`/FORMAT.jsonl."""
    return write_jsonl(folder / f"{data_format}.jsonl", rows(data_format, count, num_labels=num_labels))
