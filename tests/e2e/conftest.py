"""The world of these tests: a cluster with KubeRay, the operator in it as a pod, S3, and a namespace for each test."""

import hashlib
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from kubernetes.client import ApiClient
from kubernetes.config import new_client_from_config

from dsft_api import PLURAL
from tests.cluster.before_tests import make_before
from tests.cluster.build import HELM, KUEUE, PROMTOOL
from tests.cluster.images import Images
from tests.cluster.kubectl import Kubectl, KubectlError
from tests.cluster.operator_install import NAMESPACE, Install, tenant_namespace
from tests.cluster.up import Cluster, images_in_use, in_use
from tests.e2e.failure_report import story
from tests.e2e.followed import Followed, follow
from tests.e2e.manifests import Assets
from tests.e2e.quickstart import Finished, run_quickstart
from tests.e2e.s3 import Bucket
from tests.e2e.tenant import Tenant
from tests.e2e.trial import HEADER, Lines, Row, Trial, train_undisturbed

HERE = Path(__file__).resolve().parent
# Marks the namespaces, so that the next session removes what a killed one left.
LABEL = "dsft.dev/e2e"
TEST_SECONDS = 2400
PULL_SECONDS = 600


@dataclass(frozen=True)
class World:
    """What is there before the first test."""

    cluster: Cluster
    images: Images

    @property
    def kubectl(self) -> Kubectl:
        return Kubectl(self.cluster.kubeconfig)


_WORLD = pytest.StashKey[World]()
_FAULTS = pytest.StashKey[list[Row]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


def pytest_collection_finish(session: pytest.Session) -> None:
    def start() -> None:
        HELM.built()
        PROMTOOL.built()
        if any(item.path.name == "test_kueue.py" for item in session.items):
            KUEUE.built()
        session.config.stash[_WORLD] = World(in_use(), images_in_use())

    make_before(session, HERE, start)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test tells what the cluster saw. What fails in a fixture is told by `Tenants`."""
    report = yield
    values: dict[str, Any] = getattr(item, "funcargs", {})
    tenants = [value for value in values.values() if isinstance(value, Tenant)]
    tenants += [value.tenant for value in values.values() if isinstance(value, Finished | Followed | Trial)]
    if report.failed and call.when == "call" and tenants:
        report.sections.append((f"namespace {tenants[0].namespace}", story(tenants[0], values["operator"])))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was seen of each fault."""
    if rows := config.stash.get(_FAULTS, []):
        terminalreporter.write_line("\n".join([HEADER, *map(str, rows)]))


@pytest.fixture(scope="session")
def world(pytestconfig: pytest.Config) -> World:
    return pytestconfig.stash[_WORLD]


@pytest.fixture(scope="session")
def bucket(world: World) -> Iterator[Bucket]:
    """A folder of this session's own in the bucket, which is also the environment's S3: for `dsft run` and our own reads."""
    storage = world.cluster.storage
    bucket = Bucket(storage, f"e2e/{uuid4().hex[:8]}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment().items():
            patch.setenv(name, value)
        yield bucket
    bucket.empty()


@pytest.fixture(scope="session")
def operator(world: World, bucket: Bucket) -> Iterator[Install]:
    """The operator as a pod, with the storage of this session as the admin's default; the trainer's image is pulled then."""
    _sweep(world.kubectl)
    _pull(world)
    install = Install.apply(world.kubectl, world.images, world.cluster.storage, bucket.uri)
    yield install
    if not world.cluster.disposable:
        install.uninstall()
        world.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture(scope="session")
def assets(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """A tiny model and its data on S3: runs of seconds."""
    return Assets.put(bucket, tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def client(world: World) -> Iterator[ApiClient]:
    with new_client_from_config(str(world.cluster.kubeconfig)) as client:
        yield client


@dataclass(frozen=True)
class Tenants:
    """Makes namespaces, and removes them with all that is in them."""

    world: World
    client: ApiClient
    bucket: Bucket
    operator: Install

    @contextmanager
    def __call__(self) -> Iterator[Tenant]:
        namespace, storage = f"e2e-{uuid4().hex[:8]}", self.world.cluster.storage
        kubectl = self.world.kubectl.within(namespace)
        objects = tenant_namespace(namespace, storage)
        objects[0]["metadata"]["labels"] = {LABEL: "true"}
        self.world.kubectl.apply(*objects)
        tenant = Tenant(kubectl, self.client, namespace, storage, self.bucket.uri)
        try:
            yield tenant
        except AssertionError:
            print(story(tenant, self.operator))
            raise
        finally:
            _remove(kubectl, namespace)
            self.bucket.empty(namespace)


@pytest.fixture(scope="session")
def tenants(world: World, client: ApiClient, bucket: Bucket, operator: Install) -> Tenants:
    return Tenants(world, client, bucket, operator)


@pytest.fixture
def tenant(tenants: Tenants) -> Iterator[Tenant]:
    """A namespace of the test's own."""
    with tenants() as tenant:
        yield tenant


@pytest.fixture(scope="module")
def shared_tenant(tenants: Tenants) -> Iterator[Tenant]:
    """A namespace for the runs that a file's tests look at together."""
    with tenants() as tenant:
        yield tenant


@pytest.fixture(scope="session")
def quickstart(tenants: Tenants, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """The quickstart, applied and finished."""
    with tenants() as tenant:
        yield run_quickstart(tenant, tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="session")
def followed(tenants: Tenants, assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    """A tiny run, followed by the `dsft` command and finished."""
    with tenants() as tenant:
        yield follow(tenant, assets, tmp_path_factory.mktemp("followed"))


@pytest.fixture(scope="session")
def reference(tenants: Tenants, assets: Assets) -> Lines:
    """What each step of the runs that are disturbed should be, by one that is not."""
    with tenants() as tenant:
        return train_undisturbed(tenant, assets)


@pytest.fixture
def trial(tenant: Tenant, assets: Assets, tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Trial]:
    """A run in the test's own namespace, for the test to break something under it."""
    book = pytestconfig.stash.setdefault(_FAULTS, [])
    with ExitStack() as stack:
        yield Trial(tenant, assets, tmp_path, book, stack)


def _pull(world: World) -> None:
    """Have a node pull the trainer's image, so that no test waits for gigabytes."""
    # The name says which image: a pod of that name has pulled it.
    pod = f"pull-{hashlib.sha256(world.images.trainer.encode()).hexdigest()[:12]}"
    kubectl = world.kubectl.within("default")
    run = ("run", pod, f"--image={world.images.trainer}", "--restart=Never", "--command", "--", "true")
    try:
        kubectl(*run)
    except KubectlError as error:
        if "already exists" not in str(error):
            raise
    succeeded = "--for=jsonpath={.status.phase}=Succeeded"
    kubectl("wait", succeeded, f"pod/{pod}", f"--timeout={PULL_SECONDS}s", seconds=PULL_SECONDS + 10)


def _sweep(kubectl: Kubectl) -> None:
    """Remove what a killed session left."""
    for item in kubectl.read("namespaces", f"--selector={LABEL}")["items"]:
        name = item["metadata"]["name"]
        _remove(kubectl.within(name), name)


def _remove(kubectl: Kubectl, namespace: str) -> None:
    """Without a farewell: nobody waits for commits any more, and the cores are wanted."""
    at_once = ("--all", "--force", "--grace-period=0", "--wait=false")
    for step in (
        ("delete", PLURAL, "--all", "--wait=false"),
        ("delete", "rayclusters.ray.io", "--all", "--wait=false"),
        ("delete", "pods", *at_once),
        ("delete", "namespace", namespace, "--wait=false"),
    ):
        try:
            kubectl(*step)
        except KubectlError as error:
            # A namespace that a killed session was removing already is half gone.
            print(f"{namespace}: {error}")
