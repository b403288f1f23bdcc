"""The files of a Git commit, over HTTP and without its history. By dulwich, since the trainer image has no Git.

Whoever serves it can change nothing of it unseen: all is looked up by Git's ids, which are digests, and begin at the commit's.
"""

import logging
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from dulwich.client import HTTPUnauthorized, Urllib3HttpGitClient
from dulwich.errors import GitProtocolError, HangupException, NotGitRepository
from dulwich.object_store import iter_tree_contents
from dulwich.objects import Commit, ObjectID
from dulwich.refs import Ref
from dulwich.repo import Repo

from dsft_api.conditions import FailureClass
from dsft_trainer.errors import TrainerError

FIELD = "spec.program.source"
# From a Secret, in spec.env. Bitbucket wants this name before a token; GitHub and GitLab take any.
TOKEN, USER = "GIT_TOKEN", "x-token-auth"
TIMEOUT_SECONDS = 60.0
COMMIT_REMEDY = "write a commit that was pushed, the 40 digits that git rev-parse tells"
SHOWN = 5
log = logging.getLogger(__name__)


def commit_files(url: str, rev: str, folder: Path, most: int) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file, in the tree's order. Links and submodules are left out, and told in the log.

    `folder` is made, and holds what was fetched: `most` bytes at most, compressed.

    Raises:
        TrainerError: ConfigInvalid for a repository or commit that is not there or not ours to read; Unknown, which is tried
            again, where no answer came.
    """
    repo = Repo.init_bare(str(folder), mkdir=True)
    try:
        _fetch(url, rev, repo, most)
        found = ObjectID(rev.encode())
        commit = repo.object_store[found] if found in repo.object_store else None  # noqa: SIM401 It has no get.
        if not isinstance(commit, Commit):
            raise _invalid("rev", f"{rev} is no commit of {url}", COMMIT_REMEDY)
        skipped: list[str] = []
        for entry in iter_tree_contents(repo.object_store, commit.tree):
            path = os.fsdecode(entry.path)
            if stat.S_ISREG(entry.mode):
                yield path, repo.object_store[entry.sha].as_raw_string()
            else:
                skipped.append(path)
        if skipped:
            log.warning("%s: left out %s links and submodules: %s", url, len(skipped), ", ".join(skipped[:SHOWN]))
    finally:
        repo.close()


def _fetch(url: str, rev: str, repo: Repo, most: int) -> None:
    """Have the commit and its files in `repo`."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    client = Urllib3HttpGitClient(
        f"{parts.scheme}://{parts.netloc}",
        username=USER if secure and TOKEN in os.environ else None,
        password=os.environ.get(TOKEN) if secure else None,
        thin_packs=False,
        timeout=TIMEOUT_SECONDS,
        quiet=True,
    )
    pack, commit, abort = repo.object_store.add_pack()

    def write(data: bytes) -> int:
        if pack.tell() + len(data) > most:
            raise _invalid("git", f"{url} has more than {most} bytes in {rev}", "leave out what is not code")
        return pack.write(data)

    def wanted(refs: Mapping[Ref, ObjectID], depth: int | None = None) -> list[ObjectID]:  # noqa: ARG001
        return [ObjectID(rev.encode())]

    try:
        client.fetch_pack(parts.path, wanted, repo.get_graph_walker(), write, depth=1)
    except BaseException as error:
        abort()
        if (failure := _failure(url, rev, error)) is None:
            raise
        raise failure from error
    commit()


def _failure(url: str, rev: str, error: BaseException) -> TrainerError | None:
    """What went wrong, in our words; None for what is not of dulwich."""
    if isinstance(error, NotGitRepository | HTTPUnauthorized):
        remedy = f"correct it, or give {TOKEN} from a Secret in spec.env"
        return _invalid("git", f"{url} is no repository that can be read", remedy)
    # Git's refusal. dulwich takes it for an end without a word in version 2 of the protocol; a cut connection reads otherwise.
    if isinstance(error, HangupException) or (isinstance(error, GitProtocolError) and "not our ref" in str(error)):
        return _invalid("rev", f"{url} has no commit {rev}", COMMIT_REMEDY)
    if isinstance(error, GitProtocolError):
        return TrainerError(FailureClass.UNKNOWN, f"{FIELD}.git: {url} does not give the commit: {error}")
    return None


def _invalid(field: str, problem: str, remedy: str) -> TrainerError:
    return TrainerError(FailureClass.CONFIG_INVALID, f"{FIELD}.{field}: {problem}", remedy)
