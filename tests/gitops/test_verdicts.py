"""What Argo CD, kstatus and Flux make of a run in each phase: one table, for the statuses that the operator itself writes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsft_api.conditions import Phase
from dsft_operator.core.plan import plan
from tests.gitops.verdicts import GITOPS_EXAMPLES, HEALTH, Told, Verdicts, ask
from tests.unit.operator.situations import CONFIG, NOW, resource
from tests.unit.operator.stories import FAILURES, USERS, WAITS, Story
from tests.unit.operator.test_plan import SITUATIONS
from tests.unit.operator.world import World

DOCS = Path(__file__).parents[2] / "docs"
UNSEEN = {"observedGeneration": -1}  # the default of the custom resource definition

WAITS_FOR_US = Verdicts("Progressing", "InProgress", "InProgress", "InProgress")
WAITS_FOR_OTHERS = Verdicts("Suspended", "InProgress", "Current", "InProgress")
TRAINS = Verdicts("Healthy", "Current", "Current", "InProgress")
TABLE = {
    "not seen by the operator": WAITS_FOR_US,
    "edited, and not seen again": WAITS_FOR_US,
    Phase.PENDING: WAITS_FOR_US,
    Phase.QUEUED: WAITS_FOR_OTHERS,
    Phase.PROVISIONING: WAITS_FOR_US,
    Phase.STARTING: WAITS_FOR_US,
    Phase.RUNNING: TRAINS,
    Phase.EXPORTING: TRAINS,
    Phase.SUSPENDING: WAITS_FOR_US,
    Phase.SUSPENDED: WAITS_FOR_OTHERS,
    Phase.SUCCEEDED: Verdicts("Healthy", "Current", "Current", "Current"),
    Phase.FAILED: Verdicts("Degraded", "Failed", "Failed", "Failed"),
    "being deleted": Verdicts("Progressing", "Terminating", "InProgress", "InProgress"),
}


def written(situation: str) -> dict[str, Any] | None:
    """The resource with the status that is decided in a situation; None where none is written."""
    seen = SITUATIONS[situation][0]()
    decision = plan(seen, NOW, CONFIG)
    if decision.status is None:
        return None
    return {**resource(generation=seen.run.generation), "status": decision.status.to_wire()}


WRITTEN = {name: found for name in SITUATIONS if (found := written(name)) is not None}


def told_otherwise(resources: dict[str, dict[str, Any]]) -> list[str]:
    """Those of which something else is told than the table has."""
    return [
        f"{name}: {kind(resources[name])}: {told.verdicts}"
        for name, told in ask(resources).items()
        if told.verdicts != TABLE[kind(resources[name])]
    ]


def kind(resource: dict[str, Any]) -> str:
    """The row of the table that a resource belongs to."""
    metadata, status = resource["metadata"], resource.get("status") or {}
    if "deletionTimestamp" in metadata:
        return "being deleted"
    if status.get("observedGeneration", -1) == -1:
        return "not seen by the operator"
    if status["observedGeneration"] != metadata["generation"]:
        return "edited, and not seen again"
    return Phase(status["phase"])


def test_each_phase_is_decided_in_some_situation() -> None:
    assert {kind(resource) for resource in WRITTEN.values()} == set(Phase)


def test_what_is_decided_in_each_situation() -> None:
    assert told_otherwise(WRITTEN) == []


def test_before_the_operator_saw_it_and_after_an_edit() -> None:
    fresh = {
        "no status": resource(),
        "an empty status": {**resource(), "status": {}},
        "as the API server makes it": {**resource(), "status": UNSEEN},
    }
    edited = {name: {**each, "metadata": {**each["metadata"], "generation": 7}} for name, each in WRITTEN.items()}
    assert {kind(each) for each in edited.values()} == {"edited, and not seen again"}
    # Without any status Flux tells an error, and waits on. The API server never gives it so.
    no_status = ask({"no status": fresh.pop("no status")})["no status"].verdicts
    assert (no_status.argo, no_status.runs[:5]) == ("Progressing", "error")
    # kstatus takes a resource without conditions for one that is as it should be. The default saves us from that.
    empty = fresh.pop("an empty status")
    assert ask({"empty": empty})["empty"].verdicts.kstatus == "Current"
    assert told_otherwise({**fresh, **edited}) == []


def test_deleted_in_any_phase() -> None:
    deletion = {"deletionTimestamp": "2026-01-01T12:00:00Z"}
    deleted = {name: {**each, "metadata": {**each["metadata"], **deletion}} for name, each in WRITTEN.items()}
    assert told_otherwise(deleted) == []


@pytest.fixture
def lived(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The resource before each change of whole runs in the operator's small world."""
    seen: list[dict[str, Any]] = []

    def remember(world: World) -> None:
        world.before = world.raw
        seen.append(world.before | {"status": world.status or UNSEEN})

    monkeypatch.setattr(World, "remember", remember)
    return seen


def test_every_status_of_whole_runs(lived: list[dict[str, Any]]) -> None:
    """With faults, edits, suspends and deletes: conditions that a phase left behind would show here."""
    exports = {"it exports for a while": Story(facts={"exports": 3})}
    for story in (FAILURES | USERS | WAITS | exports).values():
        lived.append(story.simulation().run().world.raw)
    assert {kind(resource) for resource in lived} == set(TABLE)
    assert told_otherwise({str(number): each for number, each in enumerate(lived)}) == []


def test_argo_cd_shows_what_the_conditions_say() -> None:
    told: dict[str, Told] = ask(WRITTEN)
    messages = {name: each["status"]["message"] for name, each in WRITTEN.items()}
    assert {name: told[name].message for name in WRITTEN} == messages
    assert "not seen" in ask({"fresh": {**resource(), "status": UNSEEN}})["fresh"].message


@pytest.mark.parametrize("page", ["argo-cd.md", "flux.md"])
def test_the_pages_have_this_table(page: str) -> None:
    columns = {"argo-cd.md": ("argo",), "flux.md": ("kstatus", "runs", "to_the_end")}[page]
    rows = re.findall(r"^\| (\S.*?) \|(.*)\|$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    cells = {name.strip("`"): tuple(cell.strip(" `") for cell in rest.split("|")) for name, rest in rows}
    wanted = {str(name): tuple(getattr(verdicts, column) for column in columns) for name, verdicts in TABLE.items()}
    assert {name: cells.get(name) for name in wanted} == wanted


def test_the_settings_of_argo_cd_have_the_script() -> None:
    key = "resource.customizations.health.dsft.dev_DeepSpeedFineTune"
    patch = yaml.safe_load((GITOPS_EXAMPLES / "argo-cd" / "argocd-cm.yaml").read_text(encoding="utf-8"))
    values = yaml.safe_load((GITOPS_EXAMPLES / "argo-cd" / "values.yaml").read_text(encoding="utf-8"))
    script = HEALTH.read_text(encoding="utf-8")
    assert patch["data"] == {key: script}
    assert values["configs"]["cm"] == {key: script}
