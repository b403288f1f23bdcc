"""Tokens are made once per run and key, and never taken from what is half written or damaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsft_api.job import Job
from dsft_api.layout import TOKENS
from dsft_api.status import Inputs
from dsft_trainer.checkpoint.store import Store, open_store
from dsft_trainer.data.prepare import open_prepared, tokenize_here
from dsft_trainer.data.token_cache import MANIFEST, TokenCache, discard, key_of
from tests.s3_faults import faulty
from tests.s3_server import S3Server
from tests.trainer import tiny
from tests.trainer.runs import causal_lm, first_attempt

KEY = "0123"


def job_on(digest: str | None = "sha256:0", seed: int = 7, **data: Any) -> Job:
    document = causal_lm("kept", Path("/model"), Path("/text.jsonl"), steps=1, seed=seed)["spec"]
    document["data"] |= data
    return first_attempt(document, resolved=Inputs(data_digest=digest))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_key_follows_all_that_decides_the_tokens(model: Path) -> None:
    tokenizer = tiny.tokenizer()
    keys = {
        name: key_of(job, model, tokenizer)
        for name, job in {
            "as it is": job_on(),
            "other data": job_on("sha256:1"),
            "other seed": job_on(seed=8),
            "other length": job_on(maxLength=64),
            "packed": job_on(packing=True),
            "held out": job_on(evalFraction=0.1),
        }.items()
    }
    tokenizer.chat_template = tiny.CHATML
    keys["other template"] = key_of(job_on(), model, tokenizer)
    (model / "tokenizer_config.json").write_text("{}")
    keys["other tokenizer"] = key_of(job_on(), model, tiny.tokenizer())
    assert len(set(keys.values())) == len(keys)


def test_the_key_does_not_follow_who_tokenises(model: Path) -> None:
    tokenizer = tiny.tokenizer()
    key = key_of(job_on(), model, tokenizer)
    # Who tokenises before the ranks start does not fetch a model's code.
    (model / "modeling_own.py").write_text("")
    assert key_of(job_on(), model, tokenizer) == key
    assert key_of(job_on(loader="ray-data"), model, tokenizer) == key_of(job_on(), model, tokenizer)
    assert key_of(job_on(digest=None), model, tokenizer) is None


@pytest.fixture
def made(tmp_path: Path) -> Callable[[Path], Path]:
    """Tokenises into a folder, and counts in `calls` how often it did."""
    train = tiny.dataset(tmp_path / "rows", "text", 40)
    job = job_on(train={"uri": train.as_uri(), "format": "text"}, evalFraction=0.2)

    def make(folder: Path) -> Path:
        calls.append(folder)
        return tokenize_here(job, tiny.tokenizer(), folder)

    calls: list[Path] = []
    make.calls = calls
    return make


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = (tmp_path / "run").as_uri() if request.param == "file" else request.getfixturevalue("s3_uri")
    return open_store(uri)


def test_a_later_start_takes_them_from_storage(store: Store, made: Any, tmp_path: Path) -> None:
    cache = TokenCache(store, KEY)
    first, later = tmp_path / "first", tmp_path / "later"
    assert not cache.is_there()
    cache.tokens(first, lambda: made(first), keeps=True)
    before = open_prepared(first)
    assert cache.is_there()
    cache.tokens(later, lambda: made(later), keeps=True)
    after = open_prepared(later)
    assert made.calls == [first]
    assert before.eval is not None
    assert after.eval is not None
    assert (after.train.digest, after.eval.digest) == (before.train.digest, before.eval.digest)
    discard(store)
    assert store.list(TOKENS) == []


def test_only_one_process_keeps_them_and_none_without_a_key(store: Store, made: Any, tmp_path: Path) -> None:
    TokenCache(store, KEY).tokens(tmp_path / "a", lambda: made(tmp_path / "a"), keeps=False)
    TokenCache(store, None).tokens(tmp_path / "b", lambda: made(tmp_path / "b"), keeps=True)
    assert len(made.calls) == 2
    assert store.list(TOKENS) == []


def changed_byte(store: Store) -> None:
    data = store.get_bytes(f"{TOKENS}/{KEY}/train.arrow") or b""
    middle = len(data) // 2
    store.put_bytes(f"{TOKENS}/{KEY}/train.arrow", data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


def cut_short(store: Store) -> None:
    data = store.get_bytes(f"{TOKENS}/{KEY}/train.arrow") or b""
    store.put_bytes(f"{TOKENS}/{KEY}/train.arrow", data[:-9])


DAMAGE: dict[str, Callable[[Store], Any]] = {
    "a changed byte": changed_byte,
    "cut short": cut_short,
    "a missing file": lambda store: store.delete([f"{TOKENS}/{KEY}/eval.arrow"]),
    "no manifest yet": lambda store: store.delete([f"{TOKENS}/{KEY}/{MANIFEST}"]),
    "half a manifest": lambda store: store.put_bytes(f"{TOKENS}/{KEY}/{MANIFEST}", b'{"files": [{"path"'),
    "a path out of the folder": lambda store: store.put_bytes(
        f"{TOKENS}/{KEY}/{MANIFEST}", b'{"files": [{"path": "../../run.json", "size": 2, "sha256": "", "rank": 0}]}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_made_again(damage: str, store: Store, made: Any, tmp_path: Path) -> None:
    cache = TokenCache(store, KEY)
    first, later, last = tmp_path / "first", tmp_path / "later", tmp_path / "last"
    cache.tokens(first, lambda: made(first), keeps=True)
    store.put_bytes("run.json", b"{}")
    DAMAGE[damage](store)
    cache.tokens(later, lambda: made(later), keeps=True)
    assert open_prepared(later).train.digest == open_prepared(first).train.digest
    assert cache.take(last)
    assert made.calls == [first, later]


@pytest.mark.parametrize("refused", ["GET", "PUT", "DELETE"])
def test_storage_that_refuses_costs_time_and_not_the_run(
    refused: str, s3_uri: str, s3_server: S3Server, made: Any, tmp_path: Path
) -> None:
    with faulty(s3_server.endpoint) as proxy:
        cache = TokenCache(open_store(s3_uri, endpoint_url=proxy.endpoint), KEY)
        TokenCache(cache.store, "old").tokens(tmp_path / "old", lambda: made(tmp_path / "old"), keeps=True)
        proxy.refuse = lambda method, path: method == refused and TOKENS in path
        cache.tokens(tmp_path / "new", lambda: made(tmp_path / "new"), keeps=True)
        discard(cache.store)
    assert len(open_prepared(tmp_path / "new").train) == 32


def test_tokens_of_another_key_make_room(store: Store, made: Any, tmp_path: Path) -> None:
    for key in ("old", KEY):
        TokenCache(store, key).tokens(tmp_path / key, lambda key=key: made(tmp_path / key), keeps=True)
    assert {entry.key.split("/")[1] for entry in store.list(TOKENS)} == {KEY}
