"""The operator's rights, as the API server knows them, and as it is asked for them: none is missing, and none is not used.

tests/apiserver/golden/ has what `kubectl auth can-i --list` says to the operator's ServiceAccount, for both ways in which the
chart gives rights; DSFT_WRITE_GOLDEN=1 writes it anew. Each line of it, and verb, is a test of its own.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.config import new_client_from_config

from dsft_operator.core.raycluster import ray_cluster
from tests.apiserver.audited import Asked
from tests.apiserver.rights_play import LAYOUTS, Layout, Played, play
from tests.apiserver.server import ApiServer
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import our_crds, raycluster_crd
from tests.cluster.scratch import scratch_folder
from tests.unit.operator.situations import CONFIG, begin

pytestmark = pytest.mark.timeout(600)

GOLDEN = Path(__file__).with_name("golden")
RUNS, OWN = "in the namespace of a run", "in the operator's own namespace"
FINALIZERS = "deepspeedfinetunes.dsft.dev/finalizers"
# What anybody may do who has an account.
ANYBODYS = ("selfsubject",)


@dataclass(frozen=True)
class Line:
    """One line of `kubectl auth can-i --list`."""

    place: str
    resource: str
    names: tuple[str, ...]
    verbs: tuple[str, ...]


def listed(text: str) -> list[Line]:
    """The lines about resources that are not anybody's."""
    found: list[Line] = []
    place = ""
    for line in text.splitlines():
        place = line.removeprefix("# ") if line.startswith("# ") else place
        row = re.fullmatch(r"(\S+)\s+\[\]\s+\[(.*)\]\s+\[(.*)\]", line)
        if row and not row[1].startswith(ANYBODYS):
            found.append(Line(place, row[1], tuple(row[2].split()), tuple(row[3].split())))
    return found


def golden(name: str) -> Path:
    return GOLDEN / f"can-i-{name}.txt"


def rights() -> Iterator[Any]:
    """Each verb of each line. What a ClusterRole gives shows in both places, and is for the namespaces of runs."""
    for name, layout in LAYOUTS.items():
        lines = listed(golden(name).read_text()) if golden(name).exists() else []
        of_runs = {(line.resource, line.names) for line in lines if line.place == RUNS}
        for line in lines:
            is_repeated = not layout.named and line.place == OWN and (line.resource, line.names) in of_runs
            # That one is never asked for by itself.
            if is_repeated or line.resource == FINALIZERS:
                continue
            where = "" if line.place == RUNS else "own-"
            for verb in line.verbs:
                yield pytest.param(name, line, verb, id=f"{name}-{where}{line.resource}-{verb}")


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    """One of its own: it writes down what is asked for, and has neither a root key nor a run that an operator would find."""
    with scratch_folder("dsft-rights-") as folder:
        plane = ControlPlane.start(folder / "plane", audited=[layout.user for layout in LAYOUTS.values()])
        plane.install(*our_crds(), raycluster_crd())
        plane.start_controller_manager("garbage-collector-controller", "job-controller")
        with new_client_from_config(str(plane.admin)) as client:
            yield ApiServer(plane, client)


@pytest.fixture(scope="module")
def plays(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Played]:
    """The play under a layout, played once."""
    return cache(lambda name: play(server, LAYOUTS[name], tmp_path_factory.mktemp(name)))


@pytest.fixture(params=LAYOUTS)
def played(plays: Callable[[str], Played], request: pytest.FixtureRequest) -> Played:
    return plays(request.param)


def can_i(played: Played, namespace: str) -> str:
    told = played.api.plane.kubectl("auth", "can-i", "--list", "--namespace", namespace, kubeconfig=played.kubeconfig)
    return "".join(f"{line.rstrip()}\n" for line in told.splitlines())


@pytest.fixture
def may(played: Played) -> str:
    """What the API server says that the operator may."""
    layout = played.layout
    return f"# {RUNS}\n{can_i(played, layout.runs)}\n# {OWN}\n{can_i(played, layout.own)}"


def test_what_can_i_lists(played: Played, may: str) -> None:
    path = golden(played.layout.name)
    if os.environ.get("DSFT_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(may)
    assert may == path.read_text(), "if that is meant, DSFT_WRITE_GOLDEN=1 writes it anew"


def test_no_right_is_to_everything(may: str) -> None:
    lines = listed(may)
    assert lines
    assert not [line for line in lines if "*" in "".join((line.resource, *line.names, *line.verbs))]


def test_of_secrets_it_reads_its_own_one_only(may: str) -> None:
    secrets = [(line.place, line.names, line.verbs) for line in listed(may) if line.resource == "secrets"]
    assert sorted(secrets) == [(RUNS, (), ("create",)), (OWN, (), ("create",)), (OWN, ("dsft-root-key",), ("get",))]


def test_the_play_came_to_its_end(played: Played) -> None:
    assert not played.broke_off, played.broke_off


def test_nothing_is_refused(played: Played) -> None:
    assert not played.refused(), "\n".join(dict.fromkeys(map(str, played.refused())))


@pytest.mark.parametrize(("played", "line", "verb"), rights(), indirect=["played"])
def test_each_right_is_used(played: Played, line: Line, verb: str) -> None:
    asked = [each for each in played.asked() if is_use(each, line, verb, played.layout)]
    refused = [each for each in asked if each.refused]
    assert not refused, f"refused: {refused[0]}"
    if not asked and played.broke_off:
        pytest.skip("the play, which has a test of its own, broke off before")
    assert asked, "never asked for: no right to give"


def is_use(asked: Asked, line: Line, verb: str, layout: Layout) -> bool:
    # A list or watch of all namespaces is asked for without one; what is in no namespace has none.
    is_there = (asked.namespace == layout.own) == (line.place == OWN)
    is_named = not line.names or asked.name in line.names
    return is_there and is_named and (asked.resource, asked.verb) == (line.resource, verb)


def test_without_the_right_to_finalizers_no_cluster_is_made(played: Played) -> None:
    """OwnerReferencesPermissionEnforcement asks for it in the operator's name, and no log tells."""
    make(played, played.kubeconfig)
    less = bound(played, "without-finalizers", without=FINALIZERS.partition("/")[2])
    with pytest.raises(RuntimeError, match=r"cannot set blockOwnerDeletion .* can't set finalizers on"):
        make(played, less)


def make(played: Played, kubeconfig: Path) -> None:
    """A RayCluster as the operator makes it, by a user; the server does not keep it."""
    run = replace(begin().run, namespace=played.layout.runs)
    assert run.spec is not None
    body = yaml.safe_dump(ray_cluster(run, run.spec, CONFIG, incarnation=1))
    options = ("--dry-run=server", "--validate=false", "--filename=-")
    played.api.plane.kubectl("create", *options, stdin=body, kubeconfig=kubeconfig)


def bound(played: Played, user: str, without: str) -> Path:
    """A user with the operator's rights in the namespace of the runs, but those to one resource."""
    rules = [
        rule
        for role in played.roles
        if role["metadata"].get("namespace") != played.layout.own
        for rule in role["rules"]
        if without not in rule["resources"][0]
    ]
    named = {"name": user, "namespace": played.layout.runs}
    kind = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": named}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": user}
    who = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}
    role, binding = {**kind, "kind": "Role", "rules": rules}, {**kind, "kind": "RoleBinding"}
    documents = [role, {**binding, "roleRef": reference, "subjects": [who]}]
    played.api.plane.kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all(documents))
    return played.api.plane.kubeconfig(user, user, ["system:authenticated"])
