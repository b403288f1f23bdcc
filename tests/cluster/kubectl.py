"""kubectl as a user of a cluster runs it: one kubeconfig, one namespace, an exception where it fails."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.cluster.processes import executable

SECONDS = 60.0
Document = dict[str, Any]


class KubectlError(Exception):
    """What kubectl said when it failed."""


@dataclass(frozen=True)
class Kubectl:
    """Calls kubectl. `namespace` None: that of the kubeconfig."""

    kubeconfig: Path
    namespace: str | None = None

    def __call__(self, *arguments: str | Path, stdin: str | None = None, seconds: float = SECONDS) -> str:
        """What it prints.

        Raises:
            KubectlError: with what it said, if it fails.
        """
        done = subprocess.run(
            self.argv(*arguments), input=stdin, capture_output=True, text=True, timeout=seconds, check=False
        )
        if done.returncode:
            raise KubectlError(f"kubectl {' '.join(map(str, arguments))}: {done.stderr.strip()}")
        return done.stdout

    def argv(self, *arguments: str | Path) -> list[str]:
        """The command, for those who start it themselves."""
        # Its cache is not kept in the user's home: our cluster is another one each time, at the same address.
        cache = self.kubeconfig.with_name("kubectl-cache")
        place = [] if self.namespace is None else ["--namespace", self.namespace]
        return [
            *(str(executable("kubectl")), "--kubeconfig", str(self.kubeconfig), "--cache-dir", str(cache)),
            *place,
            *map(str, arguments),
        ]

    def within(self, namespace: str) -> "Kubectl":
        """The same in a namespace."""
        return replace(self, namespace=namespace)

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Apply objects, in their order, by `kubectl apply --server-side`."""
        listed = {"apiVersion": "v1", "kind": "List", "items": [*objects]}
        self("apply", "--server-side", "--force-conflicts", "--filename=-", stdin=json.dumps(listed))

    def read(self, *arguments: str) -> Document:
        """What `kubectl get` answers, as a document."""
        return json.loads(self("get", *arguments, "--output=json"))
