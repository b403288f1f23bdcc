"""The images where they run: who they run as, what they can write, how large they are, and that no compiler is there to start."""

import json
from typing import Any

import pytest

from tests.cluster.images import unpacked
from tests.cluster.operator_install import Install
from tests.e2e.breaking import workers
from tests.e2e.conftest import World
from tests.e2e.manifests import Assets, tiny_run
from tests.e2e.tenant import Tenant

NAME = "images"
MOST_OPERATOR_MEGABYTES = 220
_LOOK = """
import json, os, pathlib, shutil
def writable(path):
    try:
        open(os.path.join(path, "probe"), "w").close()
        return True
    except OSError:
        return False
compilers = [name for name in ("cc", "gcc", "c++", "g++", "clang", "nvcc") if shutil.which(name)]
built = pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR") or pathlib.Path.home() / ".cache" / "torch_extensions")
print(json.dumps({
    "uid": os.getuid(), "root": writable("/"), "code": writable("/opt/venv"), "compilers": compilers, "built": built.exists(),
}))
"""


def look(shown: str) -> dict[str, Any]:
    return json.loads(shown.strip().splitlines()[-1])


def test_the_operator(operator: Install) -> None:
    for pod in operator.pods():
        if "deletionTimestamp" not in pod["metadata"]:
            seen = look(operator.kubectl("exec", pod["metadata"]["name"], "--", "python", "-c", _LOOK))
            assert seen == {"uid": 65532, "root": False, "code": False, "compilers": [], "built": False}


def test_the_trainer_starts_no_compiler(tenant: Tenant, assets: Assets) -> None:
    """Looked at while it trains: DeepSpeed would have built its extensions by then."""
    tenant.apply(tiny_run(NAME, assets, steps=2000))
    tenant.until_step(NAME, 1)
    for pod, container in ((tenant.head(NAME), "ray-head"), (workers(tenant)[0], "ray-worker")):
        seen = look(tenant.kubectl("exec", pod, f"--container={container}", "--", "python", "-c", _LOOK))
        assert seen == {"uid": 1000, "root": False, "code": False, "compilers": [], "built": False}
    tenant.delete(NAME)


def test_sizes_and_labels(world: World) -> None:
    if not world.cluster.disposable:
        pytest.skip("the images of another cluster are not built here")
    for name in ("operator", "trainer"):
        image = unpacked(name)
        above = (image.size - image.base_size) / 1e6
        print(
            f"{name}: {image.size / 1e6:.0f} MB unpacked, {above:.0f} MB above its base of {image.base_size / 1e6:.0f} MB"
        )
        assert image.labels["org.opencontainers.image.title"] == f"dsft-{name}"
        assert image.labels["org.opencontainers.image.licenses"] == "Apache-2.0"
        assert name != "operator" or above < MOST_OPERATOR_MEGABYTES
