"""The ranks' process group on Ray Train, set up without torch in the driver and in Ray Train's controller.

Ray's own TorchConfig imports torch wherever it is unpickled: 1.5 s of CPU, once in the driver and once in the controller, and
nothing else starts while the controller does. Here only the ranks import it. What is done in them is Ray's own code.
"""

import os
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

LEAVE_SECONDS = 30


class TorchBackend(Backend):
    """Has every rank join the group before training begins, and leave it after a good end."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: "TorchGroup") -> None:
        """One call per rank: each costs a round trip."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        size, backend, timeout_s = len(worker_group), backend_config.backend, backend_config.timeout_s
        ray.get(
            [
                worker_group.execute_single_async(number, _join, number, size, address, port, backend, timeout_s)
                for number in range(size)
            ]
        )

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: "TorchGroup") -> None:  # noqa: ARG002
        """Raises where a rank was lost, which Ray Train expects."""
        leaving = worker_group.execute_async(_leave, len(worker_group) > 1)
        with suppress(GetTimeoutError):
            ray.get(leaving, timeout=LEAVE_SECONDS)


@dataclass
class TorchGroup(BackendConfig):
    """What `ray.train.torch.TorchConfig` says, by the same names."""

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> type[Backend]:
        """Who does it."""
        return TorchBackend

    @property
    def train_func_context(self) -> Any:
        """Around the train function, on each rank."""
        return _device_made_current

    @property
    def framework(self) -> TrainingFramework:
        """For Ray's own records."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        """For Ray's own records."""
        return {"backend": self.backend, "timeout_s": self.timeout_s}


def _join(rank: int, size: int, address: str, port: int, backend: str, timeout_s: int) -> None:
    from ray.train.torch import config

    os.environ.update({"MASTER_ADDR": address, "MASTER_PORT": str(port)})
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, size, "env://", timeout_s)


def _leave(several: bool) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=several)


def _device_made_current() -> AbstractContextManager[Any]:
    from ray.train.torch.config import TorchConfigContextManager

    return TorchConfigContextManager()
