"""What a user asked an API server for, and was answered: the lines of its audit log.

The server writes a line before it answers, so whoever has seen an effect finds the request here.
"""

import json
from dataclasses import dataclass
from pathlib import Path

FORBIDDEN = 403


@dataclass(frozen=True)
class Asked:
    """A request. `resource` is spelled as `kubectl auth can-i` spells it: `deepspeedfinetunes.dsft.dev/status`."""

    verb: str
    resource: str
    namespace: str
    name: str
    code: int
    answer: str

    @property
    def refused(self) -> bool:
        """By RBAC, or by an admission plugin that asks it."""
        return self.code == FORBIDDEN

    def __str__(self) -> str:
        place = "/".join(filter(None, (self.namespace, self.name)))
        return " ".join(filter(None, (self.verb, self.resource, place, str(self.code), self.answer)))


def asked_by(user: str, log: Path) -> list[Asked]:
    """All requests for resources that the user made so far, in order."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    # The last one may be half written.
    events = (json.loads(line) for line in lines if line.endswith("\n"))
    return [_asked(event) for event in events if event["user"]["username"] == user and "objectRef" in event]


def _asked(event: dict[str, dict[str, str]]) -> Asked:
    thing, answer = event["objectRef"], event.get("responseStatus", {})
    resource = ".".join(filter(None, (thing["resource"], thing.get("apiGroup"))))
    return Asked(
        verb=str(event["verb"]),
        resource="/".join(filter(None, (resource, thing.get("subresource")))),
        namespace=thing.get("namespace", ""),
        name=thing.get("name", ""),
        code=int(answer.get("code", 0)),
        answer=answer.get("message", ""),
    )
