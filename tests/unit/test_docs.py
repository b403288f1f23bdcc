"""What the documents show is what the repository holds."""

import re
from pathlib import Path

import pytest
import yaml

from dsft_api.manifest import parse
from dsft_operator.config import OperatorConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/gitops/*.md")]
)


def test_the_manifest_in_the_readme_is_the_quickstart() -> None:
    block = re.search(r"```yaml\n(apiVersion.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert yaml.safe_load(block[1]) == yaml.safe_load((ROOT / "examples/quickstart.yaml").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_manifests_in_the_documents_are_valid(page: Path) -> None:
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
        if block.lstrip().startswith("apiVersion: config.dsft.dev/"):
            OperatorConfig.model_validate(yaml.safe_load(block))
        elif block.lstrip().startswith("apiVersion: dsft.dev/"):
            parse(block, f"{page.name}, block {number}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_each_page_is_on_the_site() -> None:
    named = set(re.findall(r": ([a-z/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    assert {page for page in pages if not page.startswith("decisions/")} == named


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_make_targets_in_the_documents_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)`", page.read_text())) | set(
        re.findall(r"^make ([a-z-]+)", page.read_text(), re.MULTILINE)
    )
    assert named
    assert named <= targets


def test_each_threat_has_a_test_that_exists() -> None:
    rows = [line for line in (ROOT / "docs/security.md").read_text().splitlines() if line.startswith("| ")]
    threats = rows[rows.index("| Threat | Answer | Test |") + 1 :]
    assert len(threats) >= 10
    for row in threats:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
