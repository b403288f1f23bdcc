"""The API server, as plain objects: the stand-in's only use of the kubernetes client."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kubernetes.client import ApiClient
from kubernetes.dynamic import DynamicClient

CLUSTERS = "/apis/ray.io/v1"
CORE = "/api/v1"
_SECONDS = 30
_WATCH_SECONDS = 240

Object = dict[str, Any]


class Api:
    """Requests by path. Failures are those of kubernetes.dynamic.exceptions (NotFoundError, ConflictError, ...)."""

    def __init__(self, client: ApiClient) -> None:
        # Paths are given, so nothing needs to be discovered.
        self._client = DynamicClient(client, discoverer=lambda *_: None)

    def get(self, path: str) -> Object:
        return self._call("GET", path)

    def items(self, path: str, label_selector: str) -> list[Object]:
        return self._call("GET", path, label_selector=label_selector)["items"]

    def create(self, path: str, body: Mapping[str, Any]) -> Object:
        return self._call("POST", path, body=body)

    def replace(self, path: str, body: Mapping[str, Any]) -> Object:
        return self._call("PUT", path, body=body)

    def merge(self, path: str, body: Mapping[str, Any]) -> Object:
        return self._call("PATCH", path, body=body, content_type="application/merge-patch+json")

    def delete(self, path: str) -> None:
        self._call("DELETE", path)

    def watch(self, path: str, label_selector: str | None = None) -> Iterator[Object]:
        """Every object that is there, then each change, until the server ends the stream after some minutes."""
        response = self._client.request(
            "GET",
            path,
            watch=True,
            # Any state, not the newest: for that the API server would wait until its cache has seen all that was written, of
            # other kinds too, which an etcd before 3.6 does not tell it; it gives up after 3 s, and so on for ever.
            resource_version="0",
            label_selector=label_selector,
            timeout_seconds=_WATCH_SECONDS,
            serialize=False,
            _request_timeout=(_SECONDS, _WATCH_SECONDS + _SECONDS),
        )
        try:
            for line in response:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return
                yield event["object"]
        finally:
            response.close()

    def _call(self, method: str, path: str, **options: Any) -> Object:
        return self._client.request(method, path, serializer=lambda _, data: data, _request_timeout=_SECONDS, **options)
