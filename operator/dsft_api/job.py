"""The job contract: what one attempt of the trainer is told. JSON in the environment variable DSFT_JOB.

It holds no secrets. The operator and `dsft run` write it, `dsft_trainer` reads it; both check `contract`.
"""

from typing import Literal

from pydantic import Field

from dsft_api.base import ApiModel
from dsft_api.spec import FineTuneSpec
from dsft_api.status import Inputs, Time

CONTRACT = 1
JOB_ENV = "DSFT_JOB"
CHAT_TEMPLATE_ENV = "DSFT_CHAT_TEMPLATE"
"""What the key of `data.chatTemplate.configMapRef` holds: the pods get it from the ConfigMap, which the operator may not read."""
SAVE_ENV = "DSFT_SAVE"
"""What `python -m dsft_trainer save` passes on: the value of annotation dsft.dev/checkpoint-request."""


class RunRef(ApiModel):
    """Which run this is."""

    namespace: str = Field(description="Namespace.")
    name: str = Field(description="Name.")
    uid: str = Field(description="Uid.")


class Ranks(ApiModel):
    """The processes that train."""

    count: int = Field(ge=1, description="World size.")
    device: Literal["cuda", "cpu"] = Field(description="Device of each rank.")
    threads: int = Field(ge=1, description="CPU threads of each rank; pinned, since sums depend on it.")


class Job(ApiModel):
    """One attempt."""

    contract: int = Field(default=CONTRACT, description="Version of this contract.")
    run: RunRef = Field(description="The run.")
    attempt: int = Field(ge=1, description="Number of the attempt.")
    spec: FineTuneSpec = Field(description="The spec.")
    spec_hash: str = Field(description="Digest of its identity part.")
    storage_prefix: str = Field(description="URI of the run's folder.")
    ranks: Ranks = Field(description="The processes that train.")
    end_by: Time | None = Field(
        default=None, description="When spec.deadlines.runSeconds are over; then it is stopped."
    )
    resolved: Inputs | None = Field(default=None, description="What the first attempt found the inputs to be.")

    def to_json(self) -> str:
        """The form that DSFT_JOB holds."""
        return self.model_dump_json(by_alias=True, exclude_none=True)
