"""The Kubernetes API for the reconciler: the only importer of the kubernetes client here. Requests out, observed values back.

Status goes by server-side apply with the resourceVersion, which tells namesakes apart too: a write that is based on an old
read is refused.
"""

# The kubernetes client is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

import base64
import json
import re
from secrets import token_hex
from typing import Any, cast

from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException

from dsft_api import API_VERSION, KIND
from dsft_api.status import FineTuneStatus
from dsft_operator.adapters.answers import SILENCE, done, found, refused, unless_there
from dsft_operator.adapters.preflights import Preflights
from dsft_operator.adapters.reading import Judge, cluster_of, pod_of, run_of, trouble_of, warnings_of
from dsft_operator.adapters.recorder import event
from dsft_operator.adapters.workloads import Workloads
from dsft_operator.config import OperatorConfig
from dsft_operator.core import naming
from dsft_operator.core.observed import Cluster, Pod, PreflightJob, Queueing, Run, Warned
from dsft_operator.core.pods import run_labels
from dsft_operator.core.raycluster import cluster_reference
from dsft_operator.ports import Key, KubeError, KubeRayMissing, Manifest

GROUP, VERSION, PLURAL = "dsft.dev", "v1alpha1", "deepspeedfinetunes"
RAY_GROUP, RAY_VERSION, RAY_PLURAL = "ray.io", "v1", "rayclusters"
FIELD_MANAGER = "dsft-operator"
# With a parameter, which the API server cuts off: without it the client would write the text as JSON once more.
APPLY = "application/apply-patch+yaml; charset=utf-8"
MERGE = "application/merge-patch+json"
TIMEOUT_SECONDS = 20.0
PAGE = 500
WARNINGS = 100


class KubeApi:
    """`ports.Kube` on one ApiClient."""

    def __init__(self, api: client.ApiClient, config: OperatorConfig) -> None:
        self._config = config
        self._api = api
        self._judge = Judge(config)
        self._objects = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)
        self._networking = client.NetworkingV1Api(api)
        self._preflights = Preflights(api)
        self._workloads = Workloads(api)
        self._root_key: bytes | None = None

    async def run(self, key: Key) -> Run | None:
        raw = await found(
            self._objects.get_namespaced_custom_object(
                GROUP, VERSION, key.namespace, PLURAL, key.name, _request_timeout=TIMEOUT_SECONDS
            )
        )
        return None if raw is None else run_of(cast("dict[str, Any]", raw), self._config, self._judge)

    async def runs(self) -> dict[Key, str]:
        versions: dict[Key, str] = {}
        for namespace in self._config.watch_namespaces or (None,):
            page: str | None = ""
            while page is not None:
                options: dict[str, Any] = {"limit": PAGE, "_request_timeout": TIMEOUT_SECONDS}
                if page:
                    options["_continue"] = page
                listed = (
                    self._objects.list_cluster_custom_object(GROUP, VERSION, PLURAL, **options)
                    if namespace is None
                    else self._objects.list_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, **options)
                )
                raw = cast("dict[str, Any]", await done(listed))
                for meta in (item["metadata"] for item in raw["items"]):
                    versions[Key(meta["namespace"], meta["name"])] = meta["resourceVersion"]
                page = raw["metadata"].get("continue") or None
        return versions

    async def cluster(self, key: Key, name: str, run_uid: str) -> Cluster | None:
        try:
            raw = await self._objects.get_namespaced_custom_object(
                RAY_GROUP, RAY_VERSION, key.namespace, RAY_PLURAL, name, _request_timeout=TIMEOUT_SECONDS
            )
        except ApiException as error:
            if error.status != 404:
                raise refused(error) from error
            # Of an object the API server tells the name; of an unknown API only that the page was not found.
            if name not in (error.body or ""):
                raise KubeRayMissing("no RayCluster API") from error
            return None
        except SILENCE as error:
            raise KubeError(f"the API server did not answer: {error!r}") from error
        return cluster_of(cast("dict[str, Any]", raw), run_uid)

    async def preflight(self, key: Key, name: str, run_uid: str) -> PreflightJob | None:
        return await self._preflights.read(key, name, run_uid)

    async def pods(self, key: Key, cluster: str) -> tuple[Pod, ...]:
        # As plain JSON: the client's typed models cost milliseconds per pod.
        response = await done(
            self._core.list_namespaced_pod_without_preload_content(
                key.namespace, label_selector=f"ray.io/cluster={cluster}", _request_timeout=TIMEOUT_SECONDS
            )
        )
        raw = json.loads(await done(response.read()))
        if response.status != 200:
            raise KubeError(f"pods cannot be listed: {raw.get('message')}")
        return tuple(pod_of(item) for item in raw["items"])

    async def queueing(self, key: Key, cluster_uid: str) -> Queueing | None:
        return await self._workloads.queueing(key.namespace, cluster_uid)

    async def warnings(self, key: Key, uid: str) -> tuple[Warned, ...]:
        response = await done(
            self._core.list_namespaced_event_without_preload_content(
                key.namespace,
                field_selector=f"involvedObject.uid={uid},type=Warning",
                limit=WARNINGS,
                _request_timeout=TIMEOUT_SECONDS,
            )
        )
        raw = json.loads(await done(response.read()))
        if response.status != 200:
            raise KubeError(f"events cannot be listed: {raw.get('message')}")
        return warnings_of(raw["items"])

    async def node_trouble(self, name: str) -> str | None:
        response = await done(self._core.read_node_without_preload_content(name, _request_timeout=TIMEOUT_SECONDS))
        raw = json.loads(await done(response.read()))
        if response.status == 404:
            return "it is gone"
        if response.status != 200:
            raise KubeError(f"node {name} cannot be read: {raw.get('message')}")
        return trouble_of(raw)

    async def create(self, manifest: Manifest) -> None:
        namespace = manifest["metadata"]["namespace"]
        match manifest["kind"]:
            case "RayCluster":
                made = self._objects.create_namespaced_custom_object(
                    RAY_GROUP,
                    RAY_VERSION,
                    namespace,
                    RAY_PLURAL,
                    manifest,
                    field_manager=FIELD_MANAGER,
                    _request_timeout=TIMEOUT_SECONDS,
                )
            case "Job":
                made = self._preflights.create(manifest)
            case "NetworkPolicy":
                made = self._networking.create_namespaced_network_policy(
                    namespace, cast("Any", manifest), field_manager=FIELD_MANAGER, _request_timeout=TIMEOUT_SECONDS
                )
            case kind:
                raise ValueError(f"the operator creates no {kind}")
        await unless_there(made)

    async def create_token(self, key: Key, cluster: str, cluster_uid: str) -> None:
        token = await self.token(cluster_uid)
        labels = run_labels(key.name, "") | {"ray.io/cluster": cluster}
        labels.pop(naming.RUN_UID_LABEL)
        secret: Manifest = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": cluster,
                "namespace": key.namespace,
                "labels": labels,
                "ownerReferences": [cluster_reference(cluster, cluster_uid)],
            },
            "type": "Opaque",
            "immutable": True,
            "stringData": {"auth_token": token},
        }
        await unless_there(
            self._core.create_namespaced_secret(
                key.namespace, cast("Any", secret), field_manager=FIELD_MANAGER, _request_timeout=TIMEOUT_SECONDS
            )
        )

    async def token(self, cluster_uid: str) -> str:
        if self._root_key is None:
            self._root_key = await self._read_or_make_root_key()
        return naming.ray_token(self._root_key, cluster_uid)

    async def delete_cluster(self, key: Key, name: str, uid: str) -> None:
        options = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=uid), propagation_policy="Background")
        try:
            await self._objects.delete_namespaced_custom_object(
                RAY_GROUP,
                RAY_VERSION,
                key.namespace,
                RAY_PLURAL,
                name,
                body=options,
                _request_timeout=TIMEOUT_SECONDS,
            )
        except ApiException as error:
            if error.status not in (404, 409):  # gone, or another one has its name
                raise refused(error) from error
        except SILENCE as error:
            raise KubeError(f"the API server did not answer: {error!r}") from error

    async def delete_job(self, key: Key, name: str, uid: str) -> None:
        await self._preflights.delete(key, name, uid)

    async def set_finalizer(self, run: Run, *, present: bool) -> str:
        others = [finalizer for finalizer in run.finalizers if finalizer != naming.FINALIZER]
        body = {
            "metadata": {
                "resourceVersion": run.resource_version,
                "finalizers": [*others, naming.FINALIZER] if present else others,
            }
        }
        raw = await done(
            self._objects.patch_namespaced_custom_object(
                GROUP,
                VERSION,
                run.namespace,
                PLURAL,
                run.name,
                body,
                field_manager=FIELD_MANAGER,
                _content_type=MERGE,
                _request_timeout=TIMEOUT_SECONDS,
            )
        )
        return cast("dict[str, Any]", raw)["metadata"]["resourceVersion"]

    async def apply_status(self, run: Run, status: FineTuneStatus, resource_version: str) -> None:
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {
                "name": run.name,
                "namespace": run.namespace,
                "uid": run.uid,
                "resourceVersion": resource_version,
            },
            "status": status.to_wire(),
        }
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{run.namespace}/{PLURAL}/{run.name}/status"
        await done(self._apply(path, body))

    async def _apply(self, path: str, body: Manifest) -> None:
        """Apply server-side. By hand, since the client's own method writes the body as ASCII JSON, see `applied`."""
        request = await self._api.param_serialize(
            method="PATCH",
            resource_path=path,
            query_params=[("fieldManager", FIELD_MANAGER), ("force", "true")],
            header_params={"Content-Type": APPLY, "Accept": "application/json"},
            body=applied(body),
            auth_settings=["BearerToken"],
        )
        response = await self._api.call_api(*request, _request_timeout=TIMEOUT_SECONDS)
        text = (await response.read() or b"").decode(errors="replace")
        if response.status != 200:
            raise ApiException.from_response(http_resp=response, body=text, data=None)

    async def event(self, run: Run, kind: str, reason: str, message: str) -> None:
        await done(
            self._core.create_namespaced_event(
                run.namespace, cast("Any", event(run, kind, reason, message)), _request_timeout=TIMEOUT_SECONDS
            )
        )

    async def _read_or_make_root_key(self) -> bytes:
        """The root key is made once. Two operators at once: the one that was first is read by both."""
        namespace, name = self._config.namespace, self._config.root_key_secret
        read = self._core.read_namespaced_secret
        secret = await found(read(name, namespace, _request_timeout=TIMEOUT_SECONDS))
        if secret is None:
            made: Manifest = {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": name, "namespace": namespace},
                "immutable": True,
                "stringData": {"key": token_hex(32)},
            }
            await unless_there(
                self._core.create_namespaced_secret(namespace, cast("Any", made), _request_timeout=TIMEOUT_SECONDS)
            )
            secret = await done(read(name, namespace, _request_timeout=TIMEOUT_SECONDS))
        return base64.b64decode((secret.data or {})["key"])


def applied(body: Manifest) -> str:
    """A body to apply, as JSON that is YAML too: the API server reads it as such.

    YAML knows no surrogates, by which ASCII JSON writes an emoji, and takes no control characters as they are.
    """
    return _NOT_YAML.sub(_escaped, json.dumps(body, ensure_ascii=False))


_NOT_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else f"\\u{code:04x}"
