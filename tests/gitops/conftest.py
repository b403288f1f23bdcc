"""What GitOps tools make of runs, by their own code: Argo CD's interpreter of Lua, kstatus, and Flux's evaluator of CEL."""

from pathlib import Path

import pytest

from tests.cluster.before_tests import make_before
from tests.cluster.build import GITOPS

HERE = Path(__file__).resolve().parent


def pytest_collection_finish(session: pytest.Session) -> None:
    make_before(session, HERE, GITOPS.built)
