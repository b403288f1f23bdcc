"""program.source: what is unpacked is what was pinned, stays in its folder, and is bounded."""

import hashlib
import io
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.identity import ProgramSource, ProgramSpec
from dsft_api.spec.placement import StorageSpec
from dsft_trainer import program_source
from dsft_trainer.errors import TrainerError
from dsft_trainer.program_source import unpacked
from tests.trainer.runs import first_attempt

CODE = b"ANSWER = 42\n"


def tar(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(CODE if member.isfile() else b""))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o6777
    info.size = len(CODE) if kind == tarfile.REGTYPE else 0
    return info


def zipped(path: Path, *names: str, mode: int = stat.S_IFREG | 0o644) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, CODE)
    return path


def source(archive: Path, digest: str | None = None) -> ProgramSource:
    found = hashlib.sha256(archive.read_bytes()).hexdigest() if archive.exists() else "0" * 64
    return ProgramSource(archive=archive.as_uri(), digest=digest or f"sha256:{found}")


def refusal(given: ProgramSource, root: Path) -> str:
    with pytest.raises(TrainerError) as raised:
        unpacked(given, StorageSpec(), root)
    assert raised.value.failure_class is FailureClass.CONFIG_INVALID
    assert "spec.program.source.archive" in raised.value.message
    assert not [path for path in root.iterdir() if not path.name.endswith(".lock")], "something was left behind"
    return raised.value.message


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch" / "programs"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda at: tar(at / "my code.tar.gz", member("pkg", tarfile.DIRTYPE), member("pkg/a.py"), member("./b.py")),
        lambda at: tar(at / "code.tgz", member("pkg/a.py"), member("b.py")),
        lambda at: zipped(at / "code.zip", "pkg/a.py", "b.py"),
        lambda at: zipped(at / "code.zip", "pkg/a.py", "b.py", mode=0),
    ],
    ids=["tar.gz", "tgz", "zip", "zip of another system"],
)
def test_an_archive_is_unpacked_once(make: Callable[[Path], Path], tmp_path: Path, root: Path) -> None:
    archive = make(tmp_path)
    given = source(archive)
    folder = unpacked(given, StorageSpec(), root)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.py")} == {"pkg/a.py", "b.py"}
    assert (folder / "pkg/a.py").read_bytes() == CODE
    assert not (folder / "b.py").stat().st_mode & (stat.S_ISUID | stat.S_ISGID)
    archive.unlink()
    assert unpacked(given, StorageSpec(), root) == folder


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda at: tar(at / "x.tar.gz", member("../../evil.py")), "leads out of it: '../../evil.py'"),
        (lambda at: tar(at / "x.tar.gz", member("/tmp/evil.py")), "leads out of it: '/tmp/evil.py'"),
        (lambda at: tar(at / "x.tar.gz", member("a", tarfile.SYMTYPE, "/etc"), member("a/b")), "no file and no folder"),
        (lambda at: tar(at / "x.tar.gz", member("a", tarfile.LNKTYPE, "/etc/passwd")), "no file and no folder"),
        (lambda at: tar(at / "x.tar.gz", member("a", tarfile.FIFOTYPE)), "no file and no folder"),
        (lambda at: tar(at / "x.tar.gz", member("a", tarfile.CHRTYPE)), "no file and no folder"),
        (lambda at: zipped(at / "x.zip", "../evil.py"), "leads out of it: '../evil.py'"),
        (lambda at: zipped(at / "x.zip", "/evil.py"), "leads out of it: '/evil.py'"),
        (lambda at: zipped(at / "x.zip", "..\\evil.py"), "leads out of it"),
        (lambda at: zipped(at / "x.zip", "a", mode=stat.S_IFLNK | 0o777), "no file and no folder"),
        (lambda at: at / "missing.zip", "does not exist"),
    ],
)
def test_what_leads_out_is_refused_and_nothing_stays(
    make: Callable[[Path], Path], word: str, tmp_path: Path, root: Path
) -> None:
    before = sorted(tmp_path.rglob("evil.py"))
    assert word in refusal(source(make(tmp_path)), root)
    assert sorted(tmp_path.rglob("evil.py")) == before == []


@pytest.mark.parametrize("name", ["x.tar.gz", "x.zip"])
@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", b"\x1f\x8b\x08\x00"], ids=repr)
def test_what_is_no_archive(name: str, content: bytes, tmp_path: Path, root: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert "cannot be unpacked" in refusal(source(tmp_path / name), root)


def test_another_archive_than_the_pinned_one(tmp_path: Path, root: Path) -> None:
    archive = tar(tmp_path / "x.tar.gz", member("a.py"))
    message = refusal(source(archive, "sha256:" + "0" * 64), root)
    assert f"is {source(archive).digest}, not sha256:0000" in message


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("MAX_ARCHIVE_BYTES", 10, "10 are the most"),
        ("MAX_UNPACKED_BYTES", len(CODE), "too large unpacked"),
        ("MAX_FILES", 1, "too large unpacked"),
    ],
)
def test_bounds(name: str, value: int, word: str, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_source, name, value)
    assert word in refusal(source(tar(tmp_path / "x.tar.gz", member("a.py"), member("b.py"))), root)


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSFT_SCRATCH", str(tmp_path))
    planted = tmp_path / f"dsft-programs-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    with pytest.raises(TrainerError, match="is not a folder of this user's alone"):
        program_source._root()


STARTED_BEFORE = """
import sys
import json.decoder  # looks along the path, and remembers where no folder is
from pathlib import Path
from dsft_api.job import Job
from dsft_trainer.program_source import use_source
try:
    import code_of_somebody
except ModuleNotFoundError:
    pass
use_source(Job.model_validate_json(Path(sys.argv[1]).read_text()))
import code_of_somebody
print(code_of_somebody.ANSWER)
"""


def test_a_rank_on_another_node_begins_before_the_code_is_there(tmp_path: Path) -> None:
    """Its PYTHONPATH comes from the head, where the folder is."""
    archive = zipped(tmp_path / "code.zip", "code_of_somebody.py")
    given = source(archive)
    assert given.digest is not None
    job = first_attempt(
        FineTuneSpec(program=ProgramSpec(entrypoint="code_of_somebody:train", source=given)),
        storage=(tmp_path / "run").as_uri(),
    )
    (tmp_path / "job.json").write_text(job.to_json())
    folder = tmp_path / f"dsft-programs-{os.getuid()}" / given.digest.removeprefix("sha256:")
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", STARTED_BEFORE, str(tmp_path / "job.json")],
        env={**os.environ, "PYTHONPATH": path, "DSFT_SCRATCH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "42\n", done.stderr
