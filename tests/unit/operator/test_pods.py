"""The pods that are made of a spec: what each field becomes, what stays ours, what is refused."""

from decimal import Decimal
from typing import Any

import pytest

from dsft_api.job import JOB_ENV, Job
from dsft_api.quantity import quantity
from dsft_operator.adapters.reading import run_of
from dsft_operator.config import OperatorConfig
from dsft_operator.core.submission import submission
from tests.unit.operator.built import allowing, group, head, manifest, pool, worker
from tests.unit.operator.situations import CONFIG, resource

Json = dict[str, Any]


def container(template: Json) -> Json:
    (only,) = template["spec"]["containers"]
    return only


def environment(template: Json) -> Json:
    """By name; a name that stands twice fails."""
    listed = container(template)["env"]
    names = [variable["name"] for variable in listed]
    assert len(names) == len(set(names))
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in listed}


def volumes(template: Json) -> Json:
    mounts = {mount["name"]: mount["mountPath"] for mount in container(template)["volumeMounts"]}
    named = {volume["name"]: {k: v for k, v in volume.items() if k != "name"} for volume in template["spec"]["volumes"]}
    assert named.keys() == mounts.keys()
    return {mounts[name]: volume for name, volume in named.items()}


PROGRAM: Json = {**dict.fromkeys(("model", "data", "training")), "checkpoint": {}}
BOTH = pytest.mark.parametrize("template", [head, worker])


@BOTH
def test_a_pod_is_confined(template: Any) -> None:
    pod = template()["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(template())["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()


@BOTH
def test_a_pod_drains_before_it_goes_and_says_how_it_ended(template: Any) -> None:
    pod = template({"checkpoint": {"drainSeconds": 100}})
    assert container(pod)["lifecycle"]["preStop"]["exec"]["command"] == ["python", "-m", "dsft_trainer", "drain"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > 100
    assert environment(pod)["DSFT_DRAIN_SECONDS"] == "100"
    assert container(pod)["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_the_head_outlives_the_workers_drain() -> None:
    grace = "terminationGracePeriodSeconds"
    assert head()["spec"][grace] > worker()["spec"][grace]


@BOTH
def test_autoscalers_and_meshes_keep_away(template: Any) -> None:
    annotations = template()["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"
    assert annotations["sidecar.istio.io/inject"] == "false"
    assert annotations["linkerd.io/inject"] == "disabled"


@BOTH
def test_a_pod_is_ready_as_soon_as_ray_is(template: Any) -> None:
    probe = container(template())["readinessProbe"]
    assert probe["httpGet"] == {"path": "/api/healthz", "port": 52365}
    assert probe["initialDelaySeconds"] <= 1
    old = CONFIG.model_copy(update={"ray": CONFIG.ray.model_copy(update={"version": "2.52.1"})})
    assert "readinessProbe" not in container(template(config=old)), "that endpoint is new in Ray 2.53"


def test_the_head_trains_nothing() -> None:
    spec = manifest(pool(gpusPerNode=4))["spec"]["headGroupSpec"]
    assert spec["rayStartParams"]["num-cpus"] == spec["rayStartParams"]["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in str(container(spec["template"])["resources"])
    assert environment(spec["template"])["RAY_JOB_STOP_SIGNAL"] == "SIGINT"


def test_token_auth_is_always_on() -> None:
    spec = manifest()["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": manifest()["metadata"]["name"]}
    assert spec["rayVersion"] == "2.60.0"


# pool, GPUs of a pod, Ray's parameters
DEVICES: dict[str, tuple[Json, Json | None, Json]] = {
    "GPUs": (pool(gpusPerNode=4), {"nvidia.com/gpu": 4}, {"num-gpus": "4"}),
    "GPUs of another name": (
        pool(gpusPerNode=2, gpuResource="gpu.intel.com/i915"),
        {"gpu.intel.com/i915": 2},
        {"num-gpus": "2"},
    ),
    "no GPUs": (pool(gpusPerNode=0), None, {"num-cpus": "1", "num-gpus": "0"}),
    "GPUs that are held, and trained on CPU": (
        {**pool(gpusPerNode=4), "execution": {"device": "cpu"}},
        {"nvidia.com/gpu": 4},
        {"num-cpus": "1", "num-gpus": "0"},
    ),
    "no GPUs, and data of a program": (
        {**pool(gpusPerNode=0), **PROGRAM, "program": {"entrypoint": "a:b", "datasets": "a:c"}},
        None,
        {"num-cpus": "2", "num-gpus": "0"},
    ),
    # As many ranks as GPUs: the device decides, not the count.
    "one GPU each, and trained on CPU": (
        {**pool(gpusPerNode=1), "execution": {"device": "cpu"}},
        {"nvidia.com/gpu": 1},
        {"num-cpus": "1", "num-gpus": "0"},
    ),
}


@pytest.mark.parametrize("name", DEVICES)
def test_devices(name: str) -> None:
    spec, limits, parameters = DEVICES[name]
    made = group(spec)
    assert container(made["template"])["resources"].get("limits") == limits
    assert made["rayStartParams"] == parameters
    assert made["replicas"] == made["minReplicas"] == made["maxReplicas"] == 2
    is_cpu = parameters["num-gpus"] == "0"
    assert (environment(made["template"]).get("DS_ACCELERATOR") == "cpu") == ("execution" in spec)
    job = Job.model_validate_json(job_of(spec))
    assert job.ranks.device == ("cpu" if is_cpu else "cuda")


def job_of(spec: Json) -> str:
    run = run_of(resource(spec), CONFIG)
    assert run.spec is not None
    return submission(run, run.spec, 1, "s3://b/p").environment[JOB_ENV]


def test_memory_is_bounded_and_shared_memory_with_it() -> None:
    asked = worker(pool(resources={"requests": {"cpu": 4, "memory": "64Gi"}}))
    assert container(asked)["resources"]["limits"]["memory"] == "64Gi"
    assert volumes(asked)["/dev/shm"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}}
    assert volumes(worker())["/dev/shm"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}
    assert volumes(head())["/dev/shm"]["emptyDir"]["sizeLimit"] == "6Gi"


def test_a_pool_says_where_its_pods_go() -> None:
    toleration = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
    placed = worker(
        pool(
            nodeSelector={"gpu": "h100"}, tolerations=[toleration], runtimeClassName="nvidia", priorityClassName="high"
        )
    )["spec"]
    assert placed["nodeSelector"] == {"gpu": "h100"}
    assert placed["tolerations"] == [toleration]
    assert (placed["runtimeClassName"], placed["priorityClassName"]) == ("nvidia", "high")
    own = head({**pool(priorityClassName="high"), "head": {"nodeSelector": {"pool": "cpu"}}})["spec"]
    assert own["nodeSelector"] == {"pool": "cpu"}
    assert own["priorityClassName"] == "high", "whoever preempts the head ends the attempt of all workers"
    assert "runtimeClassName" not in own


@BOTH
def test_storage_is_named_and_never_copied(template: Any) -> None:
    storage = {
        "uri": "s3://bucket/runs",
        "endpointUrl": "https://s3.corp",
        "region": "r1",
        "credentials": {"secretName": "s3"},
        "caBundle": {"configMapName": "corp-ca"},
    }
    pod = template({"storage": storage})
    variables = environment(pod)
    assert variables["AWS_SECRET_ACCESS_KEY"] == {"secretKeyRef": {"name": "s3", "key": "AWS_SECRET_ACCESS_KEY"}}
    assert variables["AWS_SESSION_TOKEN"]["secretKeyRef"]["optional"] is True
    assert variables["AWS_ENDPOINT_URL_S3"] == "https://s3.corp"
    assert variables["AWS_DEFAULT_REGION"] == "r1"
    assert variables["AWS_CA_BUNDLE"] == "/etc/dsft/ca/ca.crt"
    assert volumes(pod)["/etc/dsft/ca"] == {"configMap": {"name": "corp-ca"}}
    # A private CA alone must not stand for all others.
    assert not {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"} & variables.keys()


@BOTH
def test_a_chat_template_comes_from_its_config_map(template: Any) -> None:
    model, train = {"uri": "hf://org/chat", "task": "causal-lm"}, {"uri": "s3://bucket/chats", "format": "messages"}
    key = {"name": "templates", "key": "chatml"}
    pod = template({"model": model, "data": {"train": train, "chatTemplate": {"configMapRef": key}}})
    assert environment(pod)["DSFT_CHAT_TEMPLATE"] == {"configMapKeyRef": key}
    assert "DSFT_CHAT_TEMPLATE" not in environment(template({"model": model, "data": {"train": train}}))


@BOTH
def test_file_storage_is_a_claim_of_all_pods(template: Any) -> None:
    volume = {"claimName": "runs", "mountPath": "/runs"}
    pod = template({"storage": {"uri": "file:///runs", "volume": volume}})
    assert volumes(pod)["/runs"] == {"persistentVolumeClaim": {"claimName": "runs"}}


@pytest.mark.parametrize(
    ("scratch", "volume"),
    [
        (None, {"emptyDir": {}}),
        ({"size": "1Ti"}, {"emptyDir": {"sizeLimit": "1Ti"}}),
        (
            {"size": "1Ti", "storageClassName": "nvme"},
            {
                "ephemeral": {
                    "volumeClaimTemplate": {
                        "spec": {
                            "accessModes": ["ReadWriteOnce"],
                            "storageClassName": "nvme",
                            "resources": {"requests": {"storage": "1Ti"}},
                        }
                    }
                }
            },
        ),
    ],
)
def test_scratch(scratch: Json | None, volume: Json) -> None:
    pod = worker(pool(**({"scratch": scratch} if scratch else {})))
    assert volumes(pod)["/scratch"] == volume
    assert environment(pod)["DSFT_SCRATCH"] == "/scratch"


def test_a_model_cache_is_the_hubs_home() -> None:
    pod = worker(pool(modelCache={"claimName": "hub"}))
    assert volumes(pod)["/model-cache"] == {"persistentVolumeClaim": {"claimName": "hub"}}
    assert environment(pod)["HF_HOME"] == "/model-cache"


def test_models_of_the_hub_go_to_scratch_unless_the_user_says_where() -> None:
    assert environment(worker())["HF_HOME"] == "/scratch/huggingface"
    assert environment(worker({"env": [{"name": "HF_HOME", "value": "/x"}]}))["HF_HOME"] == "/x"


@BOTH
def test_the_image_is_the_runs_else_the_admins(template: Any) -> None:
    admin = OperatorConfig.model_validate(
        {"image": {"trainer": "corp/trainer:1", "pullPolicy": "IfNotPresent", "pullSecrets": [{"name": "corp"}]}}
    )
    default = template(config=admin)
    assert container(default)["image"] == "corp/trainer:1"
    assert container(default)["imagePullPolicy"] == "IfNotPresent"
    own = template({"image": {"trainer": "own:2", "pullPolicy": "Always", "pullSecrets": [{"name": "own"}]}}, admin)
    assert (container(own)["image"], container(own)["imagePullPolicy"]) == ("own:2", "Always")
    assert own["spec"]["imagePullSecrets"] == [{"name": "corp"}, {"name": "own"}]


@BOTH
def test_proxies_mirrors_and_tokens_come_by_env(template: Any) -> None:
    env = [
        {"name": "HTTPS_PROXY", "value": "http://proxy:3128"},
        {"name": "HF_ENDPOINT", "value": "https://mirror"},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
    ]
    spec = {"env": env, "envFrom": [{"secretRef": {"name": "more"}}], "serviceAccountName": "trainer"}
    pod = template(spec, allowing(serviceAccounts=["trainer"]))
    variables = environment(pod)
    assert variables["HTTPS_PROXY"] == "http://proxy:3128"
    assert variables["HF_ENDPOINT"] == "https://mirror"
    assert variables["HF_TOKEN"] == {"secretKeyRef": {"name": "hf", "key": "token"}}
    assert container(pod)["envFrom"] == [{"secretRef": {"name": "more"}}]
    assert pod["spec"]["serviceAccountName"] == "trainer"


def test_a_pod_template_adds_and_never_replaces() -> None:
    given = {
        "metadata": {
            "labels": {"team": "a", "dsft.dev/run": "other"},
            "annotations": {"note": "x", "karpenter.sh/do-not-disrupt": "false"},
        },
        "spec": {"affinity": {"nodeAffinity": {}}, "schedulerName": "gang"},
    }
    pod = worker(pool(podTemplate=given), allowing(podLabels=["*"], podAnnotations=["*"]))
    assert pod["metadata"]["labels"]["team"] == "a"
    assert pod["metadata"]["labels"]["dsft.dev/run"] == "chat"
    assert pod["metadata"]["annotations"]["note"] == "x"
    assert pod["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"
    assert pod["spec"]["affinity"] == {"nodeAffinity": {}}
    assert pod["spec"]["schedulerName"] == "gang"


# what is written, words of the refusal
REFUSED: dict[str, tuple[Json, str]] = {
    "a host path": (pool(podTemplate={"spec": {"volumes": []}}), "podTemplate.spec.volumes: may not be set"),
    "another part": (pool(podTemplate={"status": {}}), "podTemplate.status: may not be set"),
    "a part that is no mapping": (pool(podTemplate={"spec": "x"}), "podTemplate.spec: may not be set"),
    "labels that are a list": (
        pool(podTemplate={"metadata": {"labels": ["a"]}}),
        "podTemplate.metadata.labels: is no mapping of strings",
    ),
    "a label that is a number": (
        pool(podTemplate={"metadata": {"labels": {"a": 1}}}),
        "podTemplate.metadata.labels: is no mapping of strings",
    ),
    "the head's name": (pool(name="head"), "nodePools[0].name: is the name of the head's group"),
    "Ray's token": ({"env": [{"name": "RAY_AUTH_MODE", "value": "disabled"}]}, "env[0].name: is set by the operator"),
    "what storage sets": (
        {"storage": {"uri": "s3://bucket", "region": "r"}, "env": [{"name": "AWS_DEFAULT_REGION", "value": "q"}]},
        "env[0].name: is set by the operator",
    ),
    "what a pool sets": (
        {**pool(modelCache={"claimName": "hub"}), "env": [{"name": "HF_HOME", "value": "/x"}]},
        "env[0].name: is set by the operator",
    ),
    "a job that no process can be given": (
        {"deepspeed": {"config": {"x": "y" * 130_000}}},
        "spec: is 13",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_ours_is_refused_by_name(name: str) -> None:
    spec, words = REFUSED[name]
    problems = "\n".join(map(str, run_of(resource(spec), CONFIG).problems))
    assert words in problems


def test_the_largest_job_fits_into_the_environment() -> None:
    spec = {"env": [{"name": f"N{n}", "value": "v" * 4000} for n in range(28)]}
    run = run_of(resource(spec), CONFIG)
    assert run.problems == ()
    assert 110_000 < len(f"{JOB_ENV}={job_of(spec)}\0".encode()) < 128 * 1024


def test_a_job_counts_as_ray_passes_it_on() -> None:
    """As a string in JSON, where each quote takes another byte, and each letter that is not ASCII six."""
    for awkward in ('"', "ö"):
        spec = {"env": [{"name": f"N{n}", "value": awkward * 4000} for n in range(10)]}
        problems = run_of(resource(spec), CONFIG).problems
        assert [problem.field for problem in problems] == ["spec"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500m", "0.5"),
        (4, "4"),
        ("1.5", "1.5"),
        ("2k", "2000"),
        ("1Ki", "1024"),
        ("3Gi", "3221225472"),
        ("1e3", "1000"),
    ],
)
def test_quantities(text: int | str, number: str) -> None:
    assert quantity(text) == Decimal(number)
