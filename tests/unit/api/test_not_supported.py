"""What is accepted and not built yet, and what only a cluster carries out."""

import pytest

from dsft_api.checks import check
from dsft_api.conditions import Reason
from dsft_api.manifest import ManifestError, parse
from dsft_api.not_supported import CLUSTER_ONLY, NOT_BUILT, cluster_only, written
from dsft_api.problem import path_of
from dsft_api.wording import fields_at

# What the user wrote -> the field that is refused.
NOT_YET = [
    ({"spec.deepspeed.offload": {"optimizer": "cpu"}}, "spec.deepspeed.offload.optimizer"),
    ({"spec.deepspeed.offload": {"params": "cpu"}}, "spec.deepspeed.offload.params"),
]


@pytest.mark.parametrize(("edits", "field"), NOT_YET, ids=[row[1] for row in NOT_YET])
def test_what_is_not_built_is_refused_by_name(manifest, edits, field):
    with pytest.raises(ManifestError) as raised:
        parse(manifest(edits))
    (problem,) = raised.value.problems
    assert (problem.field.replace("[0]", "[]"), problem.reason) == (field, Reason.NOT_SUPPORTED)
    assert "remove it" in problem.remedy


def test_every_row_of_not_supported_is_tried_here():
    assert {field for _, field in NOT_YET} == {f"spec.{row.path}" for row in NOT_BUILT}


def test_values_without_effect_may_be_written_out(manifest):
    edits = {
        "spec.data.packing": False,
        "spec.execution.attention": "eager",
        "spec.execution.lossKernel": "standard",
        "spec.deepspeed.offload": {"optimizer": "none", "params": "none"},
    }
    assert check(parse(manifest(edits))) == ()


@pytest.mark.parametrize("path", [*(row.path for row in NOT_BUILT), *CLUSTER_ONLY])
def test_every_path_names_a_real_field(path):
    *above, last = path_of(f"spec.{path.replace('[]', '[0]')}")
    assert last in fields_at(tuple(above))


def test_fields_for_clusters_are_listed_once_and_only_if_written(manifest):
    assert cluster_only(parse(manifest({}))) == ()
    resource = parse(
        manifest(
            {
                "spec.nodePools": [
                    {"name": "a", "gpusPerNode": 1, "nodeSelector": {"gpu": "h100"}},
                    {"name": "b", "gpusPerNode": 1, "nodeSelector": {"gpu": "h200"}},
                ],
                "spec.queue": {"name": "team"},
                "spec.deadlines": {"stallSeconds": 60, "queueSeconds": 60},
            }
        )
    )
    assert cluster_only(resource) == ("spec.nodePools[].nodeSelector", "spec.queue", "spec.deadlines.queueSeconds")


def test_written_paths_carry_their_places(manifest):
    spec = parse(manifest({})).spec
    assert list(written(spec, "nodePools[].name")) == [(("nodePools", 0, "name"), "gpu")]
    with pytest.raises(KeyError):
        list(written(spec, "nodePools[].colour"))


def test_defaults_that_the_api_server_writes_are_not_refused(manifest):
    assert parse(manifest({"spec.export.mergeLora": True}))
