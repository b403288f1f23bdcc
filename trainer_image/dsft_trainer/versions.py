"""The versions that decide what a run computes, as run.json, commits and model cards record them."""

from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("dsft", "deepspeed", "torch", "transformers", "ray")


def versions() -> dict[str, str]:
    """Installed versions by package; what is not installed is left out."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
