"""The API server as tests use it: namespaces of their own, kubectl, and DeepSpeedFineTunes as plain documents.

What the server refuses is an exception that carries the server's own messages.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from kubernetes.client import ApiClient, ApiException, CoreV1Api, CustomObjectsApi, V1Namespace, V1ObjectMeta
from kubernetes.client import V1ServiceAccount as ServiceAccount

from dsft_api import GROUP, PLURAL, VERSION
from tests.cluster.control_plane import ControlPlane

Document = dict[str, Any]
_APPLY = "application/apply-patch+yaml"


class RefusedError(Exception):
    """The server said no."""

    def __init__(self, answer: ApiException) -> None:
        body = json.loads(answer.body)
        super().__init__(body["message"])
        self.code: int = body["code"]
        self.reason: str = body["reason"]
        causes = (body.get("details") or {}).get("causes") or []
        self.causes: dict[str, list[str]] = {}
        for cause in causes:
            self.causes.setdefault(cause.get("field", ""), []).append(cause["message"])


@dataclass(frozen=True)
class ApiServer:
    """A real API server with our CRDs, and a client with all rights."""

    plane: ControlPlane
    client: ApiClient

    @property
    def kubeconfig(self) -> Path:
        """Of a user with all rights."""
        return self.plane.admin

    def make_namespace(self, name: str | None = None) -> str:
        """Make a namespace, of this name or one that nobody else uses. Pods may be created in it. It goes with the server."""
        name = name or f"test-{uuid4().hex[:12]}"
        core = CoreV1Api(self.client)
        core.create_namespace(V1Namespace(metadata=V1ObjectMeta(name=name)))
        try:
            # Made by the controller manager, where one runs.
            core.create_namespaced_service_account(name, ServiceAccount(metadata=V1ObjectMeta(name="default")))
        except ApiException as answer:
            if answer.status != 409:
                raise
        return name


@dataclass(frozen=True)
class Runs:
    """The DeepSpeedFineTunes of one namespace."""

    client: ApiClient
    namespace: str

    def create(self, document: Mapping[str, Any], *, dry_run: bool = False, strict: bool = True) -> Document:
        """Create one, as `kubectl create --validate=strict` does; what is stored."""
        return self._asked(
            CustomObjectsApi(self.client).create_namespaced_custom_object,
            body=dict(document),
            field_validation="Strict" if strict else "Warn",
            **({"dry_run": "All"} if dry_run else {}),
        )

    def get(self, name: str) -> Document:
        """The stored one."""
        return self._asked(CustomObjectsApi(self.client).get_namespaced_custom_object, name=name)

    def names(self) -> list[str]:
        """Of those that are stored."""
        listed = self._asked(CustomObjectsApi(self.client).list_namespaced_custom_object)
        return [item["metadata"]["name"] for item in listed["items"]]

    def delete(self, name: str) -> None:
        """Delete it; it stays while it has a finalizer."""
        self._asked(CustomObjectsApi(self.client).delete_namespaced_custom_object, name=name)

    def replace(self, document: Mapping[str, Any], *, dry_run: bool = False) -> Document:
        """Update one; its status is not part of that."""
        return self._asked(
            CustomObjectsApi(self.client).replace_namespaced_custom_object,
            name=document["metadata"]["name"],
            body=dict(document),
            **({"dry_run": "All"} if dry_run else {}),
        )

    def set_finalizers(self, name: str, *finalizers: str, **metadata: str) -> Document:
        """Merge finalizers into it. `metadata` such as `resourceVersion` is a precondition."""
        return self._asked(
            CustomObjectsApi(self.client).patch_namespaced_custom_object,
            name=name,
            body={"metadata": {"finalizers": list(finalizers), **metadata}},
            _content_type="application/merge-patch+json",
        )

    def apply_status(
        self, name: str, status: Mapping[str, Any], *, manager: str = "dsft-operator", **metadata: str
    ) -> Document:
        """Apply a status server-side. `metadata` such as `resourceVersion` is a precondition."""
        document = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "DeepSpeedFineTune",
            "metadata": {"name": name, **metadata},
            "status": dict(status),
        }
        return self._asked(
            CustomObjectsApi(self.client).patch_namespaced_custom_object_status,
            name=name,
            body=document,
            field_manager=manager,
            _content_type=_APPLY,
        )

    def _asked(self, call: Any, **arguments: Any) -> Document:
        try:
            return call(group=GROUP, version=VERSION, plural=PLURAL, namespace=self.namespace, **arguments)
        except ApiException as answer:
            raise RefusedError(answer) from None
