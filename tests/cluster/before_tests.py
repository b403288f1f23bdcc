"""What the tests of a folder need and takes minutes to make is made before the first of them, and told as it goes on.

In a fixture it would run into the timeout of whichever test came first.
"""

from collections.abc import Callable
from pathlib import Path

import pytest


def make_before(session: pytest.Session, folder: Path, make: Callable[[], object]) -> None:
    """Call `make`, with its output shown, if tests of the folder are about to run. For `pytest_collection_finish`."""
    if session.config.option.collectonly or not any(folder in item.path.parents for item in session.items):
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        make()
