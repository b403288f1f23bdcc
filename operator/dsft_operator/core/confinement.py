"""Whether a run asks for no more than the admin lets its namespace have (`tenant_policy`). Pure: nothing is created before.

Each row is a field as the user wrote it, its value and the patterns it must pass; bounds on GPUs, nodes and time follow.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from dsft_api.conditions import Reason
from dsft_api.problem import Path, Problem, field_name
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.placement import EnvVar, ResourceRequirements, Toleration
from dsft_api.uris import uris
from dsft_operator.core.pod_template import ExtraContainer, given_part, pod_template
from dsft_operator.tenant_policy import TenantPolicy, allows, allows_uri, whole_name

_URIS = ("storage", "endpoints", "sources", "trust_remote_code")
_AWS = "https://s3.amazonaws.com"
_NATIVE = ("cpu", "memory", "ephemeral-storage")


class Asked(NamedTuple):
    """A value that somebody must have allowed, and the setting that says who may have what."""

    path: Path
    value: str
    setting: str


def confinement_problems(
    spec: FineTuneSpec, policy: TenantPolicy | None, namespace: str, gpu_resource: str
) -> Iterator[Problem]:
    """A NotAllowed problem for each thing that the policy of the namespace does not allow.

    Args:
        spec: as the user wrote it: what the admin's defaults add needs nobody's leave.
        policy: of the namespace; None if no row is for it.
        namespace: of the run.
        gpu_resource: the admin's, which needs no leave.
    """
    if policy is None:
        remedy = "have the admin write one: policies[].namespaces of the operator's settings"
        yield Problem("metadata.namespace", "has no policy", remedy, namespace, Reason.NOT_ALLOWED)
        return
    for asked in _asked(spec, gpu_resource):
        patterns: Sequence[str] = getattr(policy, asked.setting)
        judge = allows_uri if asked.setting in _URIS else allows
        if not judge(patterns, asked.value, namespace):
            yield _refusal(asked.path, asked.value, asked.setting, _words(patterns, namespace))
    for path, toleration in _tolerations(spec):
        if not _tolerable(toleration, policy.tolerations, namespace):
            yield _refusal(path, toleration.key or "every taint", "tolerations", _words(policy.tolerations, namespace))
    yield from _bounds(spec, policy)
    yield from _switches(spec, policy)


def bounded(spec: FineTuneSpec, policy: TenantPolicy | None) -> FineTuneSpec:
    """The spec within the policy's times: also one that is refused, since what it began may go on."""
    if policy is None:
        return spec
    changes: dict[str, Any] = {}
    run, keep = (policy.max_run_seconds, policy.max_keep_cluster_seconds)
    if run is not None:
        seconds = min(run, spec.deadlines.run_seconds or run)
        changes["deadlines"] = spec.deadlines.model_copy(update={"run_seconds": seconds})
    if keep is not None:
        changes["keep_cluster_seconds"] = min(keep, spec.keep_cluster_seconds)
    return spec.model_copy(update=changes)


def _asked(spec: FineTuneSpec, gpu_resource: str) -> Iterator[Asked]:
    storage = spec.storage
    if spec.image.trainer is not None:
        yield Asked(("spec", "image", "trainer"), whole_name(spec.image.trainer), "images")
    yield Asked(("spec", "serviceAccountName"), spec.service_account_name or "default", "service_accounts")
    if spec.program is not None:
        yield Asked(("spec", "program", "entrypoint"), spec.program.entrypoint, "programs")
        if spec.program.datasets is not None:
            yield Asked(("spec", "program", "datasets"), spec.program.datasets, "programs")
    if storage.uri is not None:
        yield Asked(("spec", "storage", "uri"), storage.uri, "storage")
    if storage.endpoint_url is not None:
        yield Asked(("spec", "storage", "endpointUrl"), storage.endpoint_url, "endpoints")
    elif storage.uri is not None and storage.uri.startswith("s3://"):
        yield Asked(("spec", "storage", "endpointUrl"), _AWS, "endpoints")
    if spec.start_from is not None:
        yield Asked(("spec", "startFrom", "run"), spec.start_from.run, "start_from")
    if spec.queue is not None:
        yield Asked(("spec", "queue", "name"), spec.queue.name, "queues")
        yield Asked(("spec", "queue", "scheduler"), spec.queue.scheduler, "queue_schedulers")
        if spec.queue.priority_class is not None:
            yield Asked(("spec", "queue", "priorityClass"), spec.queue.priority_class, "priority_classes")
    yield from _sources(spec)
    yield from _references(spec)
    yield from _resources(("spec", "head", "resources"), spec.head.resources)
    yield from _pools(spec, gpu_resource)


def _sources(spec: FineTuneSpec) -> Iterator[Asked]:
    if spec.model is not None and spec.model.trust_remote_code:
        revision = spec.model.revision or ("main" if spec.model.uri.startswith("hf://") else None)
        named = f"{spec.model.uri}@{revision}" if revision else spec.model.uri
        yield Asked(("spec", "model", "trustRemoteCode"), named, "trust_remote_code")
    for field, uri in uris(spec):
        if field != "spec.storage.uri":
            yield Asked((field,), uri, "sources")
    template = spec.data.chat_template if spec.data is not None else None
    if template is not None and template.from_model is not None and "://" not in template.from_model:
        yield Asked(("spec", "data", "chatTemplate", "fromModel"), f"hf://{template.from_model}", "sources")


def _references(spec: FineTuneSpec) -> Iterator[Asked]:
    """Secrets, ConfigMaps and claims by name: the pods read what whoever wrote the manifest may not be able to."""
    storage = spec.storage
    if storage.credentials is not None:
        yield Asked(("spec", "storage", "credentials", "secretName"), storage.credentials.secret_name, "secrets")
    if storage.ca_bundle is not None:
        yield Asked(("spec", "storage", "caBundle", "configMapName"), storage.ca_bundle.config_map_name, "config_maps")
    if storage.volume is not None:
        yield Asked(("spec", "storage", "volume", "claimName"), storage.volume.claim_name, "volume_claims")
    template = spec.data.chat_template if spec.data is not None else None
    if template is not None and template.config_map_ref is not None:
        path = ("spec", "data", "chatTemplate", "configMapRef", "name")
        yield Asked(path, template.config_map_ref.name, "config_maps")
    for index, secret in enumerate(spec.image.pull_secrets):
        yield Asked(("spec", "image", "pullSecrets", index, "name"), secret.name, "secrets")
    yield from _variables(("spec", "env"), spec.env)
    for index, source in enumerate(spec.env_from):
        if source.secret_ref is not None:
            yield Asked(("spec", "envFrom", index, "secretRef", "name"), source.secret_ref.name, "secrets")
        if source.config_map_ref is not None:
            yield Asked(("spec", "envFrom", index, "configMapRef", "name"), source.config_map_ref.name, "config_maps")


def _variables(above: Path, variables: Sequence[EnvVar]) -> Iterator[Asked]:
    for index, variable in enumerate(variables):
        source = variable.value_from
        if source is not None and source.secret_key_ref is not None:
            yield Asked((*above, index, "valueFrom", "secretKeyRef", "name"), source.secret_key_ref.name, "secrets")
        if source is not None and source.config_map_key_ref is not None:
            path = (*above, index, "valueFrom", "configMapKeyRef", "name")
            yield Asked(path, source.config_map_key_ref.name, "config_maps")


def _pools(spec: FineTuneSpec, gpu_resource: str) -> Iterator[Asked]:
    for index, pool in enumerate(spec.node_pools):
        above: Path = ("spec", "nodePools", index)
        if pool.gpu_resource is not None and pool.gpu_resource != gpu_resource:
            yield Asked((*above, "gpuResource"), pool.gpu_resource, "gpu_resources")
        if pool.scratch is not None and pool.scratch.storage_class_name is not None:
            yield Asked((*above, "scratch", "storageClassName"), pool.scratch.storage_class_name, "storage_classes")
        if pool.runtime_class_name is not None:
            yield Asked((*above, "runtimeClassName"), pool.runtime_class_name, "runtime_classes")
        if pool.priority_class_name is not None:
            yield Asked((*above, "priorityClassName"), pool.priority_class_name, "priority_classes")
        if pool.model_cache is not None:
            yield Asked((*above, "modelCache", "claimName"), pool.model_cache.claim_name, "volume_claims")
        yield from _resources((*above, "resources"), pool.resources)
        template: Path = (*above, "podTemplate")
        for name, setting in (("labels", "pod_labels"), ("annotations", "pod_annotations")):
            for key in _names(given_part(pool, "metadata").get(name)):
                yield Asked((*template, "metadata", name, key), key, setting)
        scheduler = given_part(pool, "spec").get("schedulerName")
        if scheduler is not None:
            yield Asked((*template, "spec", "schedulerName"), str(scheduler), "schedulers")
        for place, containers in pod_template(pool).containers():
            for number, container in enumerate(containers):
                yield from _container((*template, "spec", place, number), container)


def _container(above: Path, container: ExtraContainer) -> Iterator[Asked]:
    yield Asked((*above, "image"), whole_name(container.image), "images")
    yield from _variables((*above, "env"), container.env)
    yield from _resources((*above, "resources"), container.resources)


def _names(given: object) -> Iterator[str]:
    yield from cast("Mapping[str, object]", given) if isinstance(given, dict) else ()


def _resources(above: Path, resources: ResourceRequirements) -> Iterator[Asked]:
    for part, named in (("requests", resources.requests), ("limits", resources.limits)):
        for name in named:
            if name not in _NATIVE:
                yield Asked((*above, part, name), name, "extended_resources")


def _tolerations(spec: FineTuneSpec) -> Iterator[tuple[Path, Toleration]]:
    for index, toleration in enumerate(spec.head.tolerations):
        yield ("spec", "head", "tolerations", index), toleration
    for number, pool in enumerate(spec.node_pools):
        for index, toleration in enumerate(pool.tolerations):
            yield ("spec", "nodePools", number, "tolerations", index), toleration


def _tolerable(toleration: Toleration, patterns: Sequence[str], namespace: str) -> bool:
    if toleration.key:
        return allows(patterns, toleration.key, namespace)
    # Without a key it tolerates every taint, also each one that is refused.
    return "*" in patterns and not any(pattern.startswith("!") for pattern in patterns)


def _bounds(spec: FineTuneSpec, policy: TenantPolicy) -> Iterator[Problem]:
    nodes = sum(pool.nodes for pool in spec.node_pools)
    asked = (
        (("spec", "nodePools"), spec.gpus, policy.max_gpus, "GPUs", "max_gpus"),
        (("spec", "nodePools"), nodes, policy.max_nodes, "nodes", "max_nodes"),
        (
            ("spec", "deadlines", "runSeconds"),
            spec.deadlines.run_seconds or 0,
            policy.max_run_seconds,
            "seconds",
            "max_run_seconds",
        ),
        (
            ("spec", "keepClusterSeconds"),
            spec.keep_cluster_seconds,
            policy.max_keep_cluster_seconds,
            "seconds",
            "max_keep_cluster_seconds",
        ),
    )
    for path, value, bound, unit, setting in asked:
        if bound is not None and value > bound:
            yield _refusal(path, f"{value} {unit}", setting, f"{bound} {unit} at most")
    if policy.queue_required and spec.queue is None:
        message, remedy = "is missing, and runs of this namespace wait in a queue", "write queue: {name: QUEUE}"
        yield Problem("spec.queue", message, remedy, reason=Reason.NOT_ALLOWED)


def _switches(spec: FineTuneSpec, policy: TenantPolicy) -> Iterator[Problem]:
    for index, pool in enumerate(spec.node_pools):
        given = given_part(pool, "spec")
        for field, setting in (
            ("hostNetwork", "host_network"),
            ("dnsConfig", "dns"),
            ("hostAliases", "dns"),
            ("containers", "sidecars"),
            ("initContainers", "init_containers"),
        ):
            if given.get(field) and not getattr(policy, setting):
                yield _refusal(("spec", "nodePools", index, "podTemplate", "spec", field), None, setting, "none")


def _refusal(path: Path, value: str | None, setting: str, allowed: str) -> Problem:
    name = TenantPolicy.model_fields[setting].alias or setting
    remedy = f"allowed: {allowed}; or have the admin allow it by policies[].{name} of the operator's settings"
    return Problem(field_name(path), "is not allowed in this namespace", remedy, value, Reason.NOT_ALLOWED)


def _words(patterns: Sequence[str], namespace: str) -> str:
    return ", ".join(pattern.replace("{namespace}", namespace) for pattern in patterns) or "none"
