"""What the schema accepts but nothing carries out yet (design law 10), and what only a cluster carries out.

Only what the user wrote counts, not defaults. A row is deleted in the change that builds its feature.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dsft_api.base import ApiModel
from dsft_api.conditions import Reason
from dsft_api.problem import Path, Problem, field_name
from dsft_api.resource import DeepSpeedFineTune
from dsft_api.spec import FineTuneSpec


@dataclass(frozen=True)
class NotBuilt:
    """One field of the spec that has no effect yet, but for the values in `allowed`."""

    path: str
    why: str
    allowed: tuple[object, ...] = ()

    @property
    def remedy(self) -> str:
        """What to do until it is built."""
        values = " or ".join(str(value).lower() for value in self.allowed)
        return f"remove it, or write {values}" if values else "remove it"


NOT_BUILT = (
    NotBuilt("deepspeed.offload.optimizer", "offload to host memory is not built yet", ("none",)),
    NotBuilt("deepspeed.offload.params", "offload to host memory is not built yet", ("none",)),
)

# Fields that speak of pods and queues; `dsft run` has none.
CLUSTER_ONLY = (
    "execution.interconnect.profile",
    "nodePools[].gpuResource",
    "nodePools[].resources",
    "nodePools[].nodeSelector",
    "nodePools[].tolerations",
    "nodePools[].runtimeClassName",
    "nodePools[].priorityClassName",
    "nodePools[].avoidFailedNodes",
    "nodePools[].scratch",
    "nodePools[].modelCache",
    "nodePools[].podTemplate",
    "head",
    "image",
    "serviceAccountName",
    "envFrom",
    "storage.volume",
    "storage.caBundle",
    "preflight",
    "queue",
    "retry",
    "deadlines.queueSeconds",
    "deadlines.provisionSeconds",
    "deadlines.runSeconds",
    "keepClusterSeconds",
)


def check_built(spec: FineTuneSpec) -> Iterator[Problem]:
    """A NotSupported problem for each field that the user wrote and that nothing carries out yet."""
    for row in NOT_BUILT:
        for path, value in written(spec, row.path):
            if value not in row.allowed:
                shown = None if isinstance(value, (ApiModel, tuple)) else value
                yield Problem(field_name(("spec", *path)), row.why, row.remedy, shown, Reason.NOT_SUPPORTED)


def cluster_only(resource: DeepSpeedFineTune) -> tuple[str, ...]:
    """The fields that the user wrote and that have no effect without a cluster, such as `spec.queue`."""
    return tuple(f"spec.{path}" for path in CLUSTER_ONLY if any(True for _ in written(resource.spec, path)))


def written(part: ApiModel, path: str, above: Path = ()) -> Iterator[tuple[Path, object]]:
    """Every place that a path in wire names leads to and that has a value other than its default: `nodePools[].name`.

    Raises:
        KeyError: if a model has no such field.
    """
    name, _, rest = path.partition(".")
    wire = name.removesuffix("[]")
    attribute = {field.alias: attribute for attribute, field in type(part).model_fields.items()}[wire]
    value = getattr(part, attribute)
    if attribute not in part.asked or value is None:
        return
    places = enumerate(value) if name.endswith("[]") else ((None, value),)
    for index, item in places:
        here = (*above, wire) if index is None else (*above, wire, index)
        if rest:
            yield from written(item, rest, here)
        else:
            yield here, item
