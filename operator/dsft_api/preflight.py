"""What `python -m dsft_trainer preflight` found, as one small JSON document: the trainer's word before there are GPUs.

It travels as the termination message of a container, of which the kubelet keeps 4096 bytes. The operator reads it as it reads
all that a tenant's image writes: bounded, and strictly.
"""

from typing import Annotated

from pydantic import AfterValidator, Field

from dsft_api.base import ApiModel
from dsft_api.conditions import FailureClass

MESSAGE_BYTES = 4096
"""What Kubernetes keeps of a termination message."""

# Texts are cut to these lengths, in this order, until the document fits.
_LENGTHS = (1000, 400, 150, 60)
_LEFT = 3
Note = Annotated[str, Field(max_length=1000)]


def _definite(kind: FailureClass) -> FailureClass:
    if kind.failure.retried:
        raise ValueError(f"{kind} may pass by itself, so it refuses no run")
    return kind


class Finding(ApiModel):
    """One thing that would end the run, of a class that is not retried."""

    failure_class: Annotated[FailureClass, AfterValidator(_definite)] = Field(
        validation_alias="class", serialization_alias="class", description="Failure class."
    )
    field: str = Field(max_length=256, description="The field of the spec that it is about.")
    message: Note = Field(description="What is wrong.")
    remedy: Note = Field(description="What to do.")

    def __str__(self) -> str:
        return f"{self.field}: {self.message} -> {self.remedy}"


class PreflightResult(ApiModel):
    """Everything that was found at once."""

    run_uid: str = Field(max_length=64, description="The run.")
    findings: Annotated[tuple[Finding, ...], Field(max_length=16)] = Field(
        default=(), description="What would end the run, in the order of the checks; none if nothing was found."
    )
    unchecked: Annotated[tuple[Note, ...], Field(max_length=16)] = Field(
        default=(), description="What could not be told from here, and why. It holds no run back."
    )

    def to_message(self) -> str:
        """It as JSON that a termination message has room for: texts are cut, then what is not among the first is left out."""
        for length in _LENGTHS:
            text = self._cut(length).model_dump_json(by_alias=True)
            if len(text.encode()) <= MESSAGE_BYTES:
                return text
        left = self.model_copy(update={"findings": self.findings[:_LEFT], "unchecked": ()})
        return left._cut(_LENGTHS[-1]).model_dump_json(by_alias=True)

    def _cut(self, length: int) -> "PreflightResult":
        findings = tuple(
            found.model_copy(update={"message": found.message[:length], "remedy": found.remedy[:length]})
            for found in self.findings
        )
        return self.model_copy(
            update={"findings": findings, "unchecked": tuple(note[:length] for note in self.unchecked)}
        )
