"""The learning rate over the steps."""

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupLR

from dsft_api.spec.identity import ScheduleSpec
from dsft_trainer.engine import lr_factor


def test_a_linear_warm_up_ends_at_the_peak() -> None:
    factor = lr_factor(ScheduleSpec(type="constant", warmup_steps=3), 10)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_a_logarithmic_warm_up_is_that_of_deepspeed_but_for_its_first_two_steps(steps: int) -> None:
    """They have a learning rate of 0 there."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = WarmupLR(optimizer, warmup_max_lr=1.0, warmup_num_steps=steps + 2)
    used: list[float] = []
    for _ in range(steps + 6):
        used.append(optimizer.param_groups[0]["lr"])
        theirs.step()
    assert used[:2] == [0.0, 0.0]
    factor = lr_factor(ScheduleSpec(type="constant", warmup_steps=steps, warmup_type="log"), 1000)
    assert [factor(step) for step in range(steps + 4)] == pytest.approx(used[2:])
