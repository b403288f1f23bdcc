"""Runs on a cluster, from outside: read, watch, and their logs. The CLI's own thin use of the Kubernetes API."""

# The kubernetes client is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

import json
from collections.abc import Iterator
from typing import Any, cast

from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from dsft_api import CHECKPOINT_REQUEST, GROUP, PLURAL, VERSION
from dsft_api.status import FineTuneStatus

FIELD_MANAGER = "dsft-cli"
TIMEOUT_SECONDS = 20
WATCH_SECONDS = 240
Json = dict[str, Any]


class ClusterError(Exception):
    """The cluster cannot be asked, or says no; fit for a user."""


class ClusterClient:
    """The cluster of the current kubeconfig context (or of the pod this runs in)."""

    def __init__(self, namespace: str | None) -> None:
        try:
            config.load_config()
        except config.ConfigException as error:
            raise ClusterError(f"no cluster: {error}; set KUBECONFIG or use `dsft run` without one") from error
        self.namespace = namespace or _context_namespace()
        self._objects = client.CustomObjectsApi()
        self._core = client.CoreV1Api()

    def get(self, name: str) -> Json:
        """One resource. Raises ClusterError."""
        return self._asked(
            lambda: self._objects.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name, _request_timeout=TIMEOUT_SECONDS
            )
        )

    def list(self, *, everywhere: bool) -> list[Json]:
        """All resources of the namespace, or of all namespaces. Raises ClusterError."""
        if everywhere:
            found = self._asked(
                lambda: self._objects.list_cluster_custom_object(
                    GROUP, VERSION, PLURAL, _request_timeout=TIMEOUT_SECONDS
                )
            )
        else:
            found = self._asked(
                lambda: self._objects.list_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, PLURAL, _request_timeout=TIMEOUT_SECONDS
                )
            )
        return found["items"]

    def watch(self, name: str) -> Iterator[Json]:
        """The resource each time it changed, beginning with now, until it is deleted. Raises ClusterError."""
        yield self.get(name)
        while True:
            stream: Any = watch.Watch().stream(
                self._objects.list_namespaced_custom_object,
                GROUP,
                VERSION,
                self.namespace,
                PLURAL,
                field_selector=f"metadata.name={name}",
                timeout_seconds=WATCH_SECONDS,
            )
            try:
                for event in stream:
                    if event["type"] == "DELETED":
                        return
                    yield event["object"]
            except (ApiException, HTTPError):
                # The stream broke or is too old: what is there now tells whether it is worth another one.
                yield self.get(name)

    def suspend(self, name: str, *, suspend: bool) -> Json:
        """Write `spec.suspend`; the resource as it is then. Raises ClusterError."""
        return self._patched(name, {"spec": {"suspend": suspend}})

    def ask_for_checkpoint(self, name: str, value: str) -> Json:
        """Write the annotation that asks for one; the resource as it is then. Raises ClusterError."""
        return self._patched(name, {"metadata": {"annotations": {CHECKPOINT_REQUEST: value}}})

    def _patched(self, name: str, body: Json) -> Json:
        return self._asked(
            lambda: self._objects.patch_namespaced_custom_object(
                GROUP,
                VERSION,
                self.namespace,
                PLURAL,
                name,
                body,
                field_manager=FIELD_MANAGER,
                _content_type="application/merge-patch+json",
                _request_timeout=TIMEOUT_SECONDS,
            )
        )

    def log_lines(self, name: str, *, follow: bool) -> Iterator[str]:
        """What the head's pod printed: Ray's start, then the trainer. Raises ClusterError."""
        status = status_of(self.get(name))
        if status.ray_cluster is None:
            raise ClusterError(f"{name} has no Ray cluster yet: {status.message or 'the operator has not seen it'}")
        selector = f"ray.io/cluster={status.ray_cluster.name},ray.io/node-type=head"
        found = self._asked(
            lambda: self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _request_timeout=TIMEOUT_SECONDS
            )
        )
        if not found.items:
            raise ClusterError(f"the Ray head of {name} is gone ({status.phase}); look in your log collector")
        pod = found.items[0].metadata.name
        response = self._asked(
            lambda: self._core.read_namespaced_pod_log(
                pod, self.namespace, container="ray-head", follow=follow, _preload_content=False
            )
        )
        for line in response:
            yield line.decode(errors="replace")

    def _asked(self, call: Any) -> Any:
        try:
            return call()
        except ApiException as error:
            raise ClusterError(f"the API server answered {error.status}: {_words(error)}") from error
        except (HTTPError, OSError) as error:
            raise ClusterError(f"the API server cannot be reached: {error}") from error


def status_of(resource: Json) -> FineTuneStatus:
    """The status of a resource; empty where the operator has not seen it."""
    return FineTuneStatus.model_validate(resource.get("status") or {})


def _context_namespace() -> str:
    try:
        _, context = config.list_kube_config_contexts()
    except config.ConfigException:
        return "default"
    return cast("Json", context)["context"].get("namespace") or "default"


def _words(error: ApiException) -> str:
    try:
        return json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
