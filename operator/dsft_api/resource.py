"""The resource itself, and the names and digests derived from it."""

import hashlib
import json
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dsft_api.base import ApiModel, DnsLabel, Labels, Rule
from dsft_api.spec import FineTuneSpec
from dsft_api.status import FineTuneStatus

RunName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)]

# Namespace of the uids that `dsft run` derives, where no API server gives one.
_LOCAL_RUNS = uuid.UUID("6f1b7e4e-3a0e-5d0c-9b1f-0d5f7a1c2e11")


class Metadata(ApiModel):
    """The part of ObjectMeta that dsft reads."""

    name: RunName = Field(description="Name of the run.")
    namespace: DnsLabel = Field(default="default", description="Namespace.")
    labels: Labels = Field(default_factory=dict[str, str], description="Labels.")
    annotations: dict[str, str] = Field(default_factory=dict[str, str], description="Annotations.")
    uid: str | None = Field(default=None, description="Uid, given by the API server.")
    generation: int | None = Field(default=None, description="Generation, counted by the API server.")


class DeepSpeedFineTune(ApiModel):
    """Fine-tunes a model with DeepSpeed ZeRO-3 on Ray."""

    api_version: Literal["dsft.dev/v1alpha1"] = Field(default="dsft.dev/v1alpha1", description="API version.")
    kind: Literal["DeepSpeedFineTune"] = Field(default="DeepSpeedFineTune", description="Kind.")
    metadata: Metadata = Field(description="Standard object metadata.")
    spec: FineTuneSpec = Field(description="What to do.")
    status: FineTuneStatus | None = Field(default=None, description="What has become of it.")

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            "metadata.name must be 40 characters at most and start with a letter",
        ),
    )


def digest(document: Any) -> str:
    """`sha256:...` of a JSON document in canonical form (sorted keys, no spaces)."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def spec_hash(spec: FineTuneSpec) -> str:
    """Digest of the identity part of a spec: equal hashes train the same model."""
    return digest(spec.identity())


def local_uid(resource: DeepSpeedFineTune, generation: int = 0) -> str:
    """The uid of a run without an API server: the same manifest gives the same uid, a changed identity another.

    `generation` counts the fresh starts (`dsft run --fresh`) of one manifest.
    """
    meta = resource.metadata
    return str(uuid.uuid5(_LOCAL_RUNS, f"{meta.namespace}/{meta.name}/{spec_hash(resource.spec)}/{generation}"))


def run_folder(namespace: str, name: str, uid: str) -> str:
    """The run's folder below `spec.storage.uri`: `<namespace>/<name>-<uid8>`."""
    return f"{namespace}/{name}-{uid[:8]}"
