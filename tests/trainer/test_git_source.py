"""program.source.git: the files of one commit, from Git's own HTTP backend, and a refusal that says what to do."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import ProgramSource
from dsft_api.spec.placement import StorageSpec
from dsft_trainer import program_source
from dsft_trainer.errors import TrainerError
from dsft_trainer.program_source import unpacked
from tests.certificates import self_signed
from tests.trainer.git_server import commit, git, serving

OTHER = "c0ffee" + "0" * 34


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    (folder / "pkg").mkdir(parents=True)
    (folder / "pkg" / "a.py").write_text("ANSWER = 41\n")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    return folder


@pytest.fixture
def url(code: Path) -> Iterator[str]:
    with serving(code) as url:
        yield url


def fetched(url: str, rev: str, root: Path) -> Path:
    return unpacked(ProgramSource(git=url, rev=rev), StorageSpec(), root)


def refusal(url: str, rev: str, root: Path) -> TrainerError:
    with pytest.raises(TrainerError) as raised:
        fetched(url, rev, root)
    assert not [path for path in root.iterdir() if not path.name.endswith(".lock")], "something was left behind"
    return raised.value


def test_the_files_of_a_commit_are_there_and_nothing_else(
    code: Path, root: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    (code / "link.py").symlink_to("pkg/a.py")
    (code / "names with ümlauts.txt").write_text("x")
    old = commit(code)
    (code / "pkg" / "a.py").write_text("ANSWER = 42\n")
    new = commit(code)
    with caplog.at_level(logging.WARNING):
        folder = fetched(url, old, root)
    assert folder == root / old
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert files == {"pkg/a.py": "ANSWER = 41\n", "names with ümlauts.txt": "x"}
    assert "left out 1 links and submodules: link.py" in caplog.text
    assert (fetched(url, new, root) / "pkg" / "a.py").read_text() == "ANSWER = 42\n"


def test_it_is_fetched_once(code: Path, root: Path) -> None:
    rev = commit(code)
    with serving(code) as url:
        first = fetched(url, rev, root)
    assert fetched(url, rev, root) == first


def test_submodules_are_left_out(code: Path, root: Path, url: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.py").touch()
    commit(other)
    commit(code)
    git(code, "submodule", "--quiet", "add", str(other), "sub")
    folder = fetched(url, commit(code), root)
    assert not (folder / "sub" / "b.py").exists()
    assert (folder / "pkg" / "a.py").exists()


def test_a_commit_that_is_not_there(code: Path, root: Path, url: str) -> None:
    commit(code)
    error = refusal(url, OTHER, root)
    assert (error.failure_class, error.message) == (
        FailureClass.CONFIG_INVALID,
        f"spec.program.source.rev: {url} has no commit {OTHER}",
    )
    assert "git rev-parse" in error.remedy


def test_an_id_that_is_not_of_a_commit(code: Path, root: Path, url: str) -> None:
    commit(code)
    tree = git(code, "rev-parse", "HEAD^{tree}")
    error = refusal(url, tree, root)
    assert error.failure_class is FailureClass.CONFIG_INVALID
    assert f"{tree} is no commit" in error.message


def test_a_repository_that_is_not_there(code: Path, root: Path, url: str) -> None:
    commit(code)
    error = refusal(url.replace("/code/", "/other/"), OTHER, root)
    assert error.failure_class is FailureClass.CONFIG_INVALID
    assert "is no repository that can be read" in error.message
    assert "GIT_TOKEN" in error.remedy


def test_a_server_that_does_not_answer_is_asked_again(code: Path, root: Path) -> None:
    commit(code)
    with serving(code) as url:
        pass
    error = refusal(url, OTHER, root)
    assert error.failure_class is FailureClass.UNKNOWN
    assert error.failure_class.failure.retried
    assert url in error.message


def test_a_private_repository_wants_the_token(
    code: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rev = commit(code)
    context, certificate = self_signed(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving(code, token="s3cret", tls=context) as url:
        error = refusal(url, rev, root)
        assert error.failure_class is FailureClass.CONFIG_INVALID
        assert "GIT_TOKEN" in error.remedy
        monkeypatch.setenv("GIT_TOKEN", "s3cret")
        assert (fetched(url, rev, root) / "pkg" / "a.py").exists()


def test_the_token_is_sent_to_nobody_without_tls(code: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rev = commit(code)
    monkeypatch.setenv("GIT_TOKEN", "s3cret")
    with serving(code, token="s3cret") as url:
        assert "is no repository that can be read" in refusal(url, rev, root).message


def test_a_server_whose_certificate_is_not_trusted(code: Path, root: Path, tmp_path: Path) -> None:
    rev = commit(code)
    context, _ = self_signed(tmp_path)
    with serving(code, tls=context) as url:
        assert "certificate verify failed" in refusal(url, rev, root).message


def test_more_than_there_is_room_for(code: Path, root: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rev = commit(code)
    monkeypatch.setattr(program_source, "MAX_ARCHIVE_BYTES", 100)
    error = refusal(url, rev, root)
    assert error.failure_class is FailureClass.CONFIG_INVALID
    assert "more than 100 bytes" in error.message
