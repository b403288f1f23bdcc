"""What a tenant may add to the pods of a pool, by `podTemplate`: an allow-list, merged under what is ours.

Containers beside Ray's are models of their own, since a container is a way out of a pod: their security context, and the
volumes they may mount, are ours to say.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from pydantic import Field, ValidationError

from dsft_api.base import ApiModel, DnsLabel
from dsft_api.problem import Path, Problem, field_name
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.placement import EnvVar, NodePool, ResourceRequirements

Manifest = dict[str, Any]

# Always, and where the admin's policy says so.
FIELDS = {
    "metadata": ("labels", "annotations"),
    "spec": ("affinity", "topologySpreadConstraints", "schedulerName", "dnsConfig", "hostAliases"),
}
_BY_POLICY = ("hostNetwork", "containers", "initContainers")
CONFINED: Manifest = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_OURS = ("ray-head", "ray-worker", "wait-gcs-ready")


class ExtraMount(ApiModel):
    """A volume of the run, mounted into another container."""

    model_config = ApiModel.model_config | {"extra": "forbid"}

    name: Literal["scratch", "shm", "storage", "model-cache"] = Field(description="Which.")
    mount_path: str = Field(pattern=r"^/.+", max_length=512, description="Where.")
    read_only: bool = Field(default=False, description="Without the right to write.")


class ExtraContainer(ApiModel):
    """A sidecar or init container of a pool's pods. A field that is not here may not be set."""

    model_config = ApiModel.model_config | {"extra": "forbid"}

    name: DnsLabel = Field(description="Name.")
    image: str = Field(min_length=1, max_length=512, description="Image.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(default=None, description="Policy.")
    command: tuple[str, ...] = Field(default=(), description="Entrypoint.")
    args: tuple[str, ...] = Field(default=(), description="Arguments.")
    working_dir: str | None = Field(default=None, description="Working directory.")
    env: tuple[EnvVar, ...] = Field(default=(), description="Variables.")
    resources: ResourceRequirements = Field(default_factory=ResourceRequirements, description="Resources.")
    volume_mounts: tuple[ExtraMount, ...] = Field(default=(), description="Volumes of the run.")
    restart_policy: Literal["Always"] | None = Field(default=None, description="Of an init container: a sidecar.")

    def to_manifest(self) -> Manifest:
        """The container as it is made: confined as Ray's own."""
        wire = {name: value for name, value in self.to_wire().items() if value not in ((), [], {})}
        return wire | {"securityContext": dict(CONFINED), "terminationMessagePolicy": "FallbackToLogsOnError"}


class NodeTerm(ApiModel):
    """One alternative."""

    match_fields: tuple[dict[str, Any], ...] | None = Field(default=None, description="Fields.")


class NodeTerms(ApiModel):
    """What `kept_away` adds to."""

    node_selector_terms: tuple[NodeTerm, ...] = Field(default=(), description="Alternatives.")


class NodeAffinity(ApiModel):
    """Affinity to nodes; the rest of it is the API server's to judge."""

    required: NodeTerms | None = Field(
        default=None, alias="requiredDuringSchedulingIgnoredDuringExecution", description="Required."
    )


class PodTerm(ApiModel):
    """Which pods a term is about."""

    namespaces: tuple[str, ...] | None = Field(default=None, description="Namespaces by name.")
    namespace_selector: dict[str, Any] | None = Field(default=None, description="Namespaces by label.")


class WeightedTerm(ApiModel):
    """A wish."""

    pod_affinity_term: PodTerm = Field(default_factory=PodTerm, description="The term.")


class PodAffinity(ApiModel):
    """Affinity to pods, or against them."""

    required: tuple[PodTerm, ...] = Field(
        default=(), alias="requiredDuringSchedulingIgnoredDuringExecution", description="Required."
    )
    preferred: tuple[WeightedTerm, ...] = Field(
        default=(), alias="preferredDuringSchedulingIgnoredDuringExecution", description="Wished."
    )


class Affinity(ApiModel):
    """The part of a pod's affinity that is judged here."""

    node_affinity: NodeAffinity | None = Field(default=None, description="To nodes.")
    pod_affinity: PodAffinity = Field(default_factory=PodAffinity, description="To pods.")
    pod_anti_affinity: PodAffinity = Field(default_factory=PodAffinity, description="Against pods.")


class PodTemplate(ApiModel):
    """The parts of a template's spec that are models. `affinity` is judged only: what is merged is what was given."""

    affinity: Affinity = Field(default_factory=Affinity, description="Where pods may run, and beside whom.")
    host_network: bool = Field(default=False, description="The node's network.")
    sidecars: tuple[ExtraContainer, ...] = Field(default=(), alias="containers", description="Beside Ray's.")
    init_containers: tuple[ExtraContainer, ...] = Field(default=(), description="Before Ray's.")

    def containers(self) -> Iterator[tuple[str, tuple[ExtraContainer, ...]]]:
        """Both lists, by the names of their fields."""
        yield "containers", self.sidecars
        yield "initContainers", self.init_containers


def given_part(pool: NodePool, part: str) -> Mapping[str, Any]:
    """`metadata` or `spec` of a pool's template; empty where it is none."""
    given = (pool.pod_template or {}).get(part)
    return cast("Mapping[str, Any]", given) if isinstance(given, dict) else {}


def pod_template(pool: NodePool) -> PodTemplate:
    """The modelled parts of a pool's template; nothing where they cannot be read, which is a problem of its own."""
    try:
        return PodTemplate.model_validate(given_part(pool, "spec"))
    except ValidationError:
        return PodTemplate()


def template_problems(spec: FineTuneSpec) -> Iterator[Problem]:
    """A problem for each field of a template that no policy allows, or that cannot be read."""
    for index, pool in enumerate(spec.node_pools):
        above: Path = ("spec", "nodePools", index, "podTemplate")
        for part, value in (pool.pod_template or {}).items():
            if part not in FIELDS or not isinstance(value, dict):
                yield Problem(field_name((*above, part)), "may not be set", f"use {' and '.join(FIELDS)} only")
                continue
            for name, given in cast("dict[str, Any]", value).items():
                yield from _field_problems((*above, part, name), part, name, given)
        volumes = {"storage": spec.storage.volume, "model-cache": pool.model_cache}
        there = ("scratch", "shm", *(name for name, asked in volumes.items() if asked is not None))
        yield from _model_problems((*above, "spec"), pool, there)


def _field_problems(path: Path, part: str, name: str, given: object) -> Iterator[Problem]:
    allowed = (*FIELDS[part], *(_BY_POLICY if part == "spec" else ()))
    if name not in allowed:
        yield Problem(field_name(path), "may not be set", f"remove it; known here: {', '.join(allowed)}")
    elif part == "metadata" and not _is_string_map(given):
        yield Problem(field_name(path), "is no mapping of strings", 'write name: "value"')


def _affinity_problems(path: Path, affinity: Affinity) -> Iterator[Problem]:
    for kind in (affinity.pod_affinity, affinity.pod_anti_affinity):
        for term in (*kind.required, *(weighted.pod_affinity_term for weighted in kind.preferred)):
            if term.namespaces or term.namespace_selector is not None:
                # Required anti-affinity with everybody keeps all others from a node, and from a whole zone.
                remedy = "remove namespaces and namespaceSelector: terms are about pods of the run's namespace"
                yield Problem(field_name(path), "speaks of pods of other namespaces", remedy)


def _model_problems(above: Path, pool: NodePool, there: Sequence[str]) -> Iterator[Problem]:
    try:
        template = PodTemplate.model_validate(given_part(pool, "spec"))
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False):
            remedy = "write it as in a pod; security and volumes of containers are the operator's to say"
            yield Problem(field_name((*above, *item["loc"])), item["msg"], remedy)
        return
    yield from _affinity_problems((*above, "affinity"), template.affinity)
    taken: list[str] = [*_OURS]
    for place, containers in template.containers():
        for index, container in enumerate(containers):
            if container.name in taken:
                remedy = "give the container a name of its own"
                yield Problem(field_name((*above, place, index, "name")), "is taken", remedy, container.name)
            taken.append(container.name)
            for number, mount in enumerate(container.volume_mounts):
                if mount.name not in there:
                    path = field_name((*above, place, index, "volumeMounts", number, "name"))
                    yield Problem(path, "is no volume of these pods", f"use one of {', '.join(there)}", mount.name)


def merged(pod: Manifest, pool: NodePool) -> Manifest:
    """A pod with the template under it: what is ours stays."""
    result = dict(pod)
    for part, names in FIELDS.items():
        given, ours = given_part(pool, part), pod[part]
        added = dict(ours)
        for name in names:
            if name in given:
                value = given[name]
                added[name] = {**value, **ours[name]} if name in ours else value
        result[part] = added
    template, body = pod_template(pool), result["spec"]
    if template.host_network:
        body |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if template.sidecars:
        body["containers"] = [*body["containers"], *(each.to_manifest() for each in template.sidecars)]
    if template.init_containers:
        body["initContainers"] = [each.to_manifest() for each in template.init_containers]
    return result


def _is_string_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in cast("dict[str, object]", value).values())
