"""The operator and trainer images of this checkout: built from its Dockerfiles by buildah, pushed to the cluster's registry.

`python -m tests.cluster.images` does both on a running cluster and prints what to pull. Layers are kept between builds,
so a change of code builds, pushes and pulls kilobytes.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster.crds import ROOT
from tests.cluster.node_layout import FOLDERS, REGISTRY, REGISTRY_ADDRESS
from tests.cluster.node_lock import only_one
from tests.cluster.node_packages import ensure_packages
from tests.cluster.node_runtime import ctr
from tests.cluster.processes import Process, answers, dies_with_us

# The image that the Dockerfiles' BASE_IMAGE stands for, from Debian's packages instead of a registry.
_SUITE = "bookworm"
_BASE_PACKAGES = ("ca-certificates", "python3", "python3-venv")
_DOCKERFILES = {"operator": "Dockerfile", "trainer": "trainer_image/Dockerfile"}
_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_BUILD_SECONDS = 1800
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Images:
    """What the cluster pulls, by digest."""

    operator: str
    trainer: str


def start_registry() -> Process:
    """Start it with what was pushed earlier, less what no tag names any more."""
    FOLDERS.kept_registry.mkdir(parents=True, exist_ok=True)
    config = FOLDERS.state / "registry.json"  # JSON is YAML
    settings = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(FOLDERS.kept_registry)}},
        "http": {"addr": REGISTRY_ADDRESS},
    }
    config.write_text(json.dumps(settings))
    if (FOLDERS.kept_registry / "docker").exists():
        _run("docker-registry", "garbage-collect", "--delete-untagged", str(config))
    process = Process.start(FOLDERS.state, "registry", ["docker-registry", "serve", config], stays=True)
    process.wait_until(registry_answers, _START_SECONDS)
    return process


def registry_answers() -> bool:
    """Whether images can be pulled."""
    return answers(f"http://{REGISTRY_ADDRESS}/v2/")


def build_and_push() -> Images:
    """Build both images and push what the registry lacks; minutes at first, then seconds."""
    ensure_packages()
    # Of a build that was killed.
    _buildah("rm", "--all")
    base = _base_image()
    digests = {name: _push(name, _build(name, base)) for name in _DOCKERFILES}
    _forget_pulled(keep=set(digests.values()))
    return Images(**{name: f"{REGISTRY}/dsft-{name}@{digest}" for name, digest in digests.items()})


def another_operator_image() -> str:
    """The operator's image with another digest: what a next release would be."""
    with only_one():
        container = _buildah("from", "--pull=false", "localhost/dsft-operator:test").strip()
        try:
            _buildah("config", "--label", "dsft.test/next=true", container)
            _buildah("commit", "--quiet", container, "localhost/dsft-operator:next")
        finally:
            _buildah("rm", container)
        return f"{REGISTRY}/dsft-operator@{_push('operator', 'localhost/dsft-operator:next', to='next')}"


@dataclass(frozen=True)
class Unpacked:
    """An image as containers see it. Sizes in bytes."""

    size: int
    base_size: int
    labels: Mapping[str, str]


def unpacked(name: str) -> Unpacked:
    """The operator's or trainer's image of this checkout, as it was built last."""
    tag = f"localhost/dsft-{name}:test"
    labels = json.loads(_buildah("inspect", "--type=image", tag))["OCIv1"]["config"].get("Labels") or {}
    with only_one():
        return Unpacked(_size(tag), _size(_base_image()), labels)


def _size(tag: str) -> int:
    container = _buildah("from", "--pull=false", tag).strip()
    try:
        root = _buildah("mount", container).strip()
        return int(_run("du", "--summarize", "--bytes", root).split()[0])
    finally:
        _buildah("umount", container)
        _buildah("rm", container)


def _build(name: str, base: str) -> str:
    """The image's name in buildah's store."""
    tag = f"localhost/dsft-{name}:test"
    started = time.monotonic()
    _buildah(
        "build",
        "--isolation=chroot",
        "--layers",
        "--pull=false",
        f"--build-arg=BASE_IMAGE={base}",
        *_package_settings(os.environ),
        f"--file={ROOT / _DOCKERFILES[name]}",
        f"--tag={tag}",
        str(ROOT),
    )
    _say(f"built the {name} image in {time.monotonic() - started:.0f} s")
    return tag


def _push(name: str, tag: str, to: str = "test") -> str:
    """The digest in the registry."""
    started = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as digest:
        # zstd packs and unpacks several times faster than gzip.
        options = ("--tls-verify=false", "--format=oci", "--compression-format=zstd", f"--digestfile={digest.name}")
        _buildah("push", *options, tag, f"docker://{REGISTRY_ADDRESS}/dsft-{name}:{to}")
        _say(f"pushed the {name} image in {time.monotonic() - started:.0f} s")
        return digest.read().strip()


def _package_settings(env: Mapping[str, str]) -> list[str]:
    """The machine's CA bundle and package index, where they are set; they hold for the build and stay out of the image."""
    index = env.get("PIP_INDEX_URL")
    arguments = {"PIP_INDEX_URL": index, "UV_DEFAULT_INDEX": env.get("UV_DEFAULT_INDEX") or index}
    settings = [f"--build-arg={key}={value}" for key, value in arguments.items() if value]
    bundle = next((env[key] for key in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE") if env.get(key)), None)
    if bundle:
        settings += [f"--build-arg={key}={_CA_BUNDLE}" for key in ("PIP_CERT", "SSL_CERT_FILE")]
        settings.append(f"--volume={Path(bundle).resolve()}:{_CA_BUNDLE}:ro")
    return settings


def _base_image() -> str:
    """A minimal Debian with Python, made by debootstrap; once per machine."""
    wanted = hashlib.sha256(json.dumps([_SUITE, _BASE_PACKAGES]).encode()).hexdigest()[:12]
    tag = f"localhost/dsft-base:{wanted}"
    if _buildah("images", "--quiet", "--filter", f"reference={tag}").strip():
        return tag
    _say(f"making a base image of Debian {_SUITE}, once")
    container = _buildah("from", "scratch").strip()
    try:
        root = Path(_buildah("mount", container).strip())
        _run("debootstrap", "--variant=minbase", f"--include={','.join(_BASE_PACKAGES)}", _SUITE, str(root))
        for leftover in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
            shutil.rmtree(root / leftover)
            (root / leftover).mkdir()
        _buildah("unmount", container)
        _buildah("commit", "--quiet", container, tag)
    finally:
        _buildah("rm", container)
    return tag


def _forget_pulled(keep: set[str]) -> None:
    """Let containerd drop earlier builds: each has gigabytes, and only these digests will be asked for.

    But not the last ones before these: most layers are the same, and without them all would be pulled and unpacked anew.
    """
    record = FOLDERS.kept_containerd / "built.json"
    last: list[list[str]] = json.loads(record.read_text()) if record.exists() else []
    if sorted(keep) not in last[:1]:
        last = [sorted(keep), *last][:2]
        record.write_text(json.dumps(last))
    lines = ctr("images", "list").splitlines()[1:]
    pulled = [line.split() for line in lines]
    ours = {digest for reference, _, digest, *_ in pulled if reference.startswith(f"{REGISTRY}/dsft-")}
    doomed = ours.difference(*last)
    if old := [reference for reference, _, digest, *_ in pulled if digest in doomed]:
        ctr("images", "delete", *old)


def _buildah(*arguments: str) -> str:
    store = ("--root", str(FOLDERS.kept_buildah), "--runroot", str(FOLDERS.state / "buildah"))
    return _run("buildah", *store, "--storage-driver=overlay", *arguments)


def _run(*argv: str) -> str:
    done = subprocess.run(
        [*dies_with_us(), *argv], capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False, cwd="/"
    )
    if done.returncode:
        output = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        raise RuntimeError(f"{' '.join(argv)} failed with exit code {done.returncode}:\n{output}")
    return done.stdout


def _say(text: str) -> None:
    print(f"tests.cluster: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Build, push, and print what to pull."""
    with only_one():
        images = build_and_push()
    print(json.dumps(asdict(images), indent=2))


if __name__ == "__main__":
    main()
