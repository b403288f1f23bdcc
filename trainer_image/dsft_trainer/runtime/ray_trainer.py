"""Ray Train's trainer, less what a run has no use for.

Every actor of Ray Train is a Python process that starts before the first step does. Two of them cost about 4 s of start-up on
two cores and do nothing here (docs/benchmarks.md). Imports Ray Train, and with it pandas: import it beside `ray.init`.
"""

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class LeanTrainer(DataParallelTrainer):
    """With `ray_torch.TorchGroup` a TorchTrainer, but with no data manager without datasets, and no cleaner of placement groups.

    The cleaner frees those of a controller that died; here such a loss ends the attempt, and they go with the driver's job.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unused: list[type[RayTrainCallback]] = [PlacementGroupCleanerCallback]
        if not self.datasets:
            unused.append(DatasetsCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, tuple(unused))]
