"""What the operator makes of a spec: the RayCluster, and its parts that the tests look at."""

from typing import Any

from dsft_operator.adapters.reading import run_of
from dsft_operator.config import OperatorConfig
from dsft_operator.core.raycluster import ray_cluster
from dsft_operator.tenant_policy import TenantPolicy
from tests.unit.operator.situations import CONFIG, resource

Json = dict[str, Any]
POOL: Json = {"name": "gpu", "nodes": 2, "gpusPerNode": 1}


def manifest(spec: Json | None = None, config: OperatorConfig = CONFIG) -> Json:
    run = run_of(resource(spec), config)
    assert run.problems == ()
    assert run.spec is not None
    return ray_cluster(run, run.spec, config, 1)


def head(spec: Json | None = None, config: OperatorConfig = CONFIG) -> Json:
    return manifest(spec, config)["spec"]["headGroupSpec"]["template"]


def group(spec: Json | None = None, config: OperatorConfig = CONFIG) -> Json:
    return manifest(spec, config)["spec"]["workerGroupSpecs"][0]


def worker(spec: Json | None = None, config: OperatorConfig = CONFIG) -> Json:
    return group(spec, config)["template"]


def pool(**fields: Any) -> Json:
    return {"nodePools": [{**POOL, **fields}]}


def allowing(**row: Any) -> OperatorConfig:
    return CONFIG.model_copy(update={"policies": (TenantPolicy.model_validate(row),)})
