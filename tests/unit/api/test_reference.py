"""The reference pages name every field, and every link in them leads somewhere."""

import re

from dsft_api.conditions import FAILURES
from dsft_api.crd import crd
from dsft_api.reference import api_reference, reasons_reference


def anchors(page: str) -> list[str]:
    """Anchors of the headings, as GitHub makes them."""
    return [re.sub(r"[^\w -]", "", heading.lower()) for heading in re.findall(r"^## (.*)$", page, re.MULTILINE)]


def test_links_lead_to_one_section_each():
    page = api_reference(crd())
    assert len(anchors(page)) == len(set(anchors(page)))
    links = re.findall(r"\(#([^)]*)\)", page)
    assert {*links, "deepspeedfinetune"} == set(anchors(page))


def test_rows_tell_type_bounds_default_and_description():
    page = api_reference(crd()).splitlines()
    rows = {line.split("`")[1]: line for line in page if line.startswith("| `")}
    assert "| `learningRate` | number, above 0, at most 1 | required | Peak learning rate. |" in page
    assert rows["keepClusterSeconds"] == (
        "| `keepClusterSeconds` | integer, at least 0 | `0` | Hold the Ray cluster after the end, for debugging. |"
    )
    assert rows["requests"].startswith("| `requests` | map of quantity |")
    assert rows["podTemplate"].startswith("| `podTemplate` | free-form object |")
    assert "- set exactly one of epochs and maxSteps" in page


def test_every_table_row_has_the_columns_of_its_head():
    for page in (api_reference(crd()), reasons_reference()):
        width = 0
        for line in page.splitlines():
            cells = len(re.findall(r"(?<!\\)\|", line))
            width = (width or cells) if cells else 0
            assert cells == width, line


def test_every_failure_class_says_what_to_do():
    page = reasons_reference()
    for name, failure in FAILURES.items():
        retried = "yes" if failure.retried else "no"
        assert f"| `{name}` | {failure.exit_code.value} | {retried} | {failure.remedy} |" in page
