"""The release as its users look at it: `helm test`, and a dashboard with no empty panel while a run trains."""

from pathlib import Path

import pytest

from tests.cluster.operator_install import Install
from tests.e2e.manifests import Assets, tiny_run
from tests.e2e.tenant import Tenant
from tests.panels import panels_without_data

NAME = "shown"
STEPS = 4000
# There is no GPU in these runs.
NEEDS_GPUS = "GPU seconds that trained nothing"


def test_helm_test(operator: Install) -> None:
    told = operator.test()
    assert "readyz: ok" in told
    assert "a replica leads" in told


@pytest.mark.long
def test_each_panel_shows_something_of_a_run_that_trains(
    operator: Install, tenant: Tenant, assets: Assets, tmp_path: Path
) -> None:
    edits = {"spec.checkpoint": {"everySteps": 10}}
    tenant.apply(tiny_run(NAME, assets, steps=STEPS, edits=edits))
    tenant.until("a checkpoint", lambda: (made := tenant.status(NAME).checkpoints) and made.blocked_seconds is not None)
    mine = f'dsft_run_loss{{name="{NAME}",namespace="{tenant.namespace}"}}'
    tenant.until("its figures", lambda: mine in operator.metrics())
    first = operator.metrics()
    tenant.until("other figures", lambda: operator.metrics() != first)
    assert panels_without_data(first, operator.metrics(), tmp_path) == [NEEDS_GPUS]
    tenant.delete(NAME)
    tenant.until("forgotten", lambda: f'namespace="{tenant.namespace}"' not in operator.metrics())
