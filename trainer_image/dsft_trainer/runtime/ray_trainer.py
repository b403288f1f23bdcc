"""Ray Train's TorchTrainer, less the helper processes that a run has no use for.

Every actor of Ray Train is a Python process that starts before the first step does. Two of them cost about 4 s of start-up on
two cores and do nothing here (docs/benchmarks.md). Imports torch: import it beside `ray.init`, not before.
"""

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.callback import RayTrainCallback


class LeanTorchTrainer(TorchTrainer):
    """A TorchTrainer that starts no data manager without datasets, and no cleaner of placement groups.

    The cleaner frees those of a controller that died; here such a loss ends the attempt, and they go with the driver's job.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unused: list[type[RayTrainCallback]] = [PlacementGroupCleanerCallback]
        if not self.datasets:
            unused.append(DatasetsCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, tuple(unused))]
