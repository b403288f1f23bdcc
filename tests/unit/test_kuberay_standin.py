"""The KubeRay stand-in's pure part does what KubeRay 1.7 does: RayCluster to pods and Service, pods to status."""

import copy
from typing import Any

import pytest

from tests.cluster.kuberay import pods, rounds, status, validation

Object = dict[str, Any]
NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z"
READY = {"type": "Ready", "status": "True"}


def ray_container(**changes: Any) -> Object:
    limits = {"cpu": "1500m", "memory": "4Gi"}
    return {"name": "ray", "image": "registry.test/trainer:1", "resources": {"limits": limits}, **changes}


def ray_cluster(**changes: Any) -> Object:
    """1 head and 2 workers with 4 GPUs each. `changes` go into the spec."""
    worker = ray_container(resources={"limits": {"cpu": 8, "memory": "64Gi", "nvidia.com/gpu": 4}})
    return {
        "metadata": {"name": "chat-1a2b3", "namespace": "ml", "uid": "u-1", "generation": 3},
        "spec": {
            "rayVersion": "2.60.0",
            "authOptions": {"mode": "token", "secretName": "chat-token"},
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0"},
                "template": {"metadata": {"labels": {"team": "a"}}, "spec": {"containers": [ray_container()]}},
            },
            "workerGroupSpecs": [
                {
                    "groupName": "h100",
                    "replicas": 2,
                    "minReplicas": 2,
                    "maxReplicas": 2,
                    "numOfHosts": 1,
                    "rayStartParams": {},
                    "template": {"spec": {"containers": [worker]}},
                }
            ],
            **changes,
        },
    }


def worker_of(cluster: Object) -> Object:
    return pods.worker_pod(cluster, cluster["spec"]["workerGroupSpecs"][0], 0)


def live(pod: Object, phase: str = "Running", **changes: Any) -> Object:
    """The pod as the API server shows it."""
    pod = copy.deepcopy(pod)
    pod["metadata"]["name"] = pod["metadata"]["generateName"] + "abcde"
    pod["status"] = {"phase": phase, "podIP": "198.18.0.9", "conditions": [READY], **changes}
    return pod


def observe(cluster: Object, *seen: Object, now: str = NOW, **changes: Any) -> Object:
    return status.new_status(cluster, status.Observed(list(seen), pods.head_service(cluster), now, **changes))


def condition(of: Object, kind: str) -> Object | None:
    return next((found for found in of["conditions"] if found["type"] == kind), None)


def state_of(of: Object, kind: str) -> tuple[str, str]:
    found = condition(of, kind)
    assert found, f"{kind} is missing in {of['conditions']}"
    return found["status"], found["reason"]


# Pods


def test_the_head_starts_ray_with_the_flags_of_its_params_and_limits() -> None:
    container = pods.head_pod(ray_cluster())["spec"]["containers"][0]
    assert container["command"] == ["/bin/bash", "-c", "--"]
    assert container["args"] == [
        "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}; ray start --head  --block  --dashboard-agent-listen-port=52365 "
        " --dashboard-host=0.0.0.0  --memory=4294967296  --metrics-export-port=8080  --num-cpus=0 "
    ]


def test_a_worker_starts_ray_with_the_address_of_the_head_service_and_its_gpus() -> None:
    command = worker_of(ray_cluster())["spec"]["containers"][0]["args"][0]
    assert " --address=chat-1a2b3-head-svc.ml.svc.cluster.local:6379 " in command
    assert " --num-cpus=8 " in command
    assert " --num-gpus=4 " in command
    assert "--head" not in command


@pytest.mark.parametrize(
    ("group", "container", "expected"),
    [
        ({}, {"limits": {"cpu": "1500m"}}, {"num-cpus": "2"}),
        ({}, {"requests": {"cpu": "500m", "memory": "1Gi"}}, {"num-cpus": "1"}),
        ({}, {"limits": {"nvidia.com/mig-1g.5gb": 2}}, {"num-gpus": "2"}),
        (
            {"resources": {"CPU": "3", "GPU": "1", "spot": "2"}},
            {},
            {"num-cpus": "3", "num-gpus": "1", "resources": "'{\"spot\":2.0}'"},
        ),
        ({"labels": {"zone": "b", "a": "c"}}, {}, {"labels": "a=c,zone=b"}),
    ],
    ids=["limit is rounded up", "request of CPUs but not of memory", "MIG counts as GPU", "resources field", "labels"],
)
def test_flags_come_from_resources_and_labels(group: Object, container: Object, expected: Object) -> None:
    cluster = ray_cluster()
    worker = cluster["spec"]["workerGroupSpecs"][0]
    worker |= group
    worker["template"]["spec"]["containers"][0]["resources"] = container
    command = worker_of(cluster)["spec"]["containers"][0]["args"][0]
    for flag in ("num-cpus", "num-gpus", "memory", "resources", "labels"):
        assert (f"--{flag}={expected[flag]} " in command) if flag in expected else (f"--{flag}=" not in command)


def test_own_command_runs_before_ray_start_and_overwrite_keeps_it() -> None:
    cluster = ray_cluster()
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["command"] = ["echo", "hello"]
    container = pods.head_pod(cluster)["spec"]["containers"][0]
    assert container["args"][0].startswith(" echo  hello  && ulimit -n ")

    cluster["metadata"]["annotations"] = {"ray.io/overwrite-container-cmd": "true"}
    container = pods.head_pod(cluster)["spec"]["containers"][0]
    assert container["command"] == ["echo", "hello"]
    assert any(env["name"] == "KUBERAY_GEN_RAY_START_CMD" and "ray start" in env["value"] for env in container["env"])


def test_pods_have_the_names_labels_and_owner_of_kuberay() -> None:
    cluster = ray_cluster()
    head, worker = pods.head_pod(cluster)["metadata"], worker_of(cluster)["metadata"]
    assert (head["generateName"], worker["generateName"]) == ("chat-1a2b3-head-", "chat-1a2b3-h100-worker-")
    assert head["labels"] == {
        "ray.io/cluster": "chat-1a2b3",
        "ray.io/node-type": "head",
        "ray.io/group": "headgroup",
        "ray.io/is-ray-node": "yes",
        "ray.io/identifier": "chat-1a2b3-head",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        "team": "a",
    }
    assert worker["labels"]["ray.io/group"] == "h100"
    assert worker["labels"]["ray.io/worker-group-replica-index"] == "0"
    assert head["ownerReferences"][0] | {"uid": "u-1", "controller": True} == head["ownerReferences"][0]


def test_a_template_cannot_replace_the_labels_that_selectors_need() -> None:
    cluster = ray_cluster()
    cluster["spec"]["headGroupSpec"]["template"]["metadata"]["labels"] = {
        "ray.io/cluster": "other",
        "ray.io/identifier": "x",
    }
    labels = pods.head_pod(cluster)["metadata"]["labels"]
    assert (labels["ray.io/cluster"], labels["ray.io/identifier"]) == ("chat-1a2b3", "x")


def test_the_environment_is_added_to_the_users_own() -> None:
    cluster = ray_cluster()
    own = [{"name": "RAY_ADDRESS", "value": "mine"}]
    cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["env"] = own
    head = {env["name"]: env for env in pods.head_pod(cluster)["spec"]["containers"][0]["env"]}
    worker = [env for env in worker_of(cluster)["spec"]["containers"][0]["env"] if env["name"] == "RAY_ADDRESS"]
    assert worker == own
    assert head["RAY_ADDRESS"]["value"] == "127.0.0.1:6379"
    assert head["RAY_AUTH_MODE"]["value"] == "token"
    assert head["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "chat-token", "key": "auth_token"}
    assert head["RAY_NODE_TYPE_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['ray.io/group']"


def test_a_worker_waits_for_the_head_with_the_same_image_environment_and_token_but_no_gpu() -> None:
    cluster = ray_cluster()
    container = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container |= {"env": [{"name": "A", "value": "b"}], "securityContext": {"runAsUser": 1000}}
    (waiting,) = worker_of(cluster)["spec"]["initContainers"]
    names = [env["name"] for env in waiting["env"]]
    assert waiting["name"] == "wait-gcs-ready"
    assert names == ["A", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "FQ_RAY_IP", "RAY_IP"]
    assert waiting["securityContext"] == {"runAsUser": 1000}
    assert waiting["resources"]["limits"] == {"cpu": "200m", "memory": "256Mi"}
    assert "volumeMounts" not in waiting, "KubeRay copies the mounts before it adds /dev/shm"
    assert "initContainers" not in pods.head_pod(cluster)["spec"]


@pytest.mark.parametrize(
    ("change", "volume"),
    [
        ({}, {"medium": "Memory", "sizeLimit": "4Gi"}),
        ({"resources": {"requests": {"memory": "1Gi"}}}, {"medium": "Memory", "sizeLimit": "1Gi"}),
        ({"resources": {}}, {"medium": "Memory"}),
        ({"volumeMounts": [{"name": "mine", "mountPath": "/dev/shm"}]}, None),
    ],
    ids=["limit", "request", "neither", "already mounted"],
)
def test_shared_memory_is_as_large_as_the_containers_memory(change: Object, volume: Object | None) -> None:
    cluster = ray_cluster()
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"] = [ray_container(**change)]
    volumes = pods.head_pod(cluster)["spec"].get("volumes", [])
    assert volumes == ([{"name": "shared-mem", "emptyDir": volume}] if volume is not None else [])


@pytest.mark.parametrize(("version", "kind"), [("2.60.0", "httpGet"), ("2.52.0", "exec"), ("", "exec")])
def test_probes_depend_on_the_ray_version(version: str, kind: str) -> None:
    cluster = ray_cluster(rayVersion=version, authOptions=None)
    container = pods.head_pod(cluster)["spec"]["containers"][0]
    assert kind in container["livenessProbe"]
    assert container["readinessProbe"]["initialDelaySeconds"] == 10


def test_building_pods_leaves_the_cluster_as_it_is() -> None:
    cluster = ray_cluster()
    before = copy.deepcopy(cluster)
    pods.head_pod(cluster)
    worker_of(cluster)
    observe(cluster, live(pods.head_pod(cluster)))
    assert cluster == before


# Service and Secret


def test_the_head_service_is_headless_and_selects_the_head() -> None:
    service = pods.head_service(ray_cluster())
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert service["metadata"]["name"] == "chat-1a2b3-head-svc"
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert service["spec"]["selector"]["ray.io/node-type"] == "head"
    assert service["spec"]["selector"].items() <= pods.head_pod(ray_cluster())["metadata"]["labels"].items()
    assert ports == {"client": 10001, "dashboard": 8265, "gcs-server": 6379, "metrics": 8080, "serve": 8000}


def test_declared_ports_replace_the_services_own_but_for_metrics() -> None:
    cluster = ray_cluster()
    declared = [{"name": "dashboard", "containerPort": 8265}, {"containerPort": 99}]
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"] = [ray_container(ports=declared)]
    ports = {port["name"]: port["port"] for port in pods.head_service(cluster)["spec"]["ports"]}
    assert ports == {"dashboard": 8265, "99-port": 99, "metrics": 8080}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (None, None),
        ({"mode": "disabled"}, None),
        ({"mode": "token", "secretName": "own"}, None),
        ({"mode": "token"}, "chat-1a2b3"),
        ({}, "chat-1a2b3"),
    ],
)
def test_kuberay_makes_a_token_secret_only_where_none_is_named(options: Object | None, name: str | None) -> None:
    cluster = ray_cluster(authOptions=options)
    assert pods.auth_secret_name(cluster) == name
    if name:
        assert pods.auth_secret(cluster, "t")["stringData"] == {"auth_token": "t"}


# Status


def test_a_new_cluster_is_provisioning_and_has_no_head() -> None:
    found = observe(ray_cluster())
    assert state_of(found, "HeadPodReady") == ("False", "HeadPodNotFound")
    assert state_of(found, "RayClusterProvisioned") == ("False", "RayClusterPodsProvisioning")
    assert "state" not in found
    assert (found["desiredWorkerReplicas"], found["readyWorkerReplicas"], found["desiredGPU"]) == (2, 0, "8")
    assert (found["desiredCPU"], found["desiredMemory"]) == ("17500m", str((4 + 128) * 2**30))


def test_it_is_ready_when_every_pod_is_and_stays_ready_when_they_die() -> None:
    cluster = ray_cluster()
    head, worker = live(pods.head_pod(cluster)), live(worker_of(cluster))
    cluster["status"] = observe(cluster, head, worker)
    assert "state" not in cluster["status"], "one worker is missing"

    cluster["status"] = observe(cluster, head, worker, worker)
    assert cluster["status"]["state"] == "ready"
    assert state_of(cluster["status"], "RayClusterProvisioned") == ("True", "AllPodRunningAndReadyFirstTime")
    assert cluster["status"]["head"] == {
        "podIP": "198.18.0.9",
        "podName": "chat-1a2b3-head-abcde",
        "serviceIP": "198.18.0.9",
        "serviceName": "chat-1a2b3-head-svc",
    }
    assert cluster["status"]["endpoints"]["dashboard"] == "8265"

    after = observe(cluster, now=LATER)
    assert after["state"] == "ready"
    assert state_of(after, "RayClusterProvisioned")[0] == "True"
    assert state_of(after, "HeadPodReady") == ("False", "HeadPodNotFound")
    assert condition(after, "HeadPodReady")["lastTransitionTime"] == LATER  # type: ignore[index]
    assert condition(after, "RayClusterProvisioned")["lastTransitionTime"] == NOW  # type: ignore[index]


@pytest.mark.parametrize(
    ("pod_status", "expected"),
    [
        ({"conditions": []}, ("False", "Unknown", "")),
        ({}, ("True", "HeadPodRunningAndReady", "")),
        (
            {
                "conditions": [
                    {"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "not ready"}
                ],
                "containerStatuses": [
                    {"name": "ray", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
                ],
            },
            ("False", "ImagePullBackOff", "not ready; ray: no such image"),
        ),
        (
            {"conditions": [{"type": "Ready", "status": "False", "reason": "PodFailed"}]},
            ("False", "PodFailed", ""),
        ),
    ],
    ids=["no condition yet", "ready", "container waits", "pod failed"],
)
def test_head_pod_ready_gives_the_pods_own_reason(pod_status: Object, expected: tuple[str, str, str]) -> None:
    assert status.head_pod_ready(live(pods.head_pod(ray_cluster()), **pod_status)) == expected


def test_suspending_takes_two_rounds_and_resuming_one() -> None:
    cluster = ray_cluster(suspend=True)
    head = live(pods.head_pod(cluster))
    cluster["status"] = observe(cluster, head)
    assert status.suspend_state(cluster["status"]["conditions"]) == "RayClusterSuspending"

    cluster["status"] = observe(cluster, head)
    assert status.suspend_state(cluster["status"]["conditions"]) == "RayClusterSuspending", "a pod is still there"

    cluster["status"] = observe(cluster)
    assert status.suspend_state(cluster["status"]["conditions"]) == "RayClusterSuspended"
    assert cluster["status"]["state"] == "suspended"
    assert state_of(cluster["status"], "RayClusterProvisioned")[0] == "False"

    cluster["spec"]["suspend"] = False
    cluster["status"] = observe(cluster)
    assert status.suspend_state(cluster["status"]["conditions"]) == ""
    assert cluster["status"]["state"] == "suspended", "until the pods are ready again"


def test_replica_failure_is_there_only_while_it_fails() -> None:
    cluster = ray_cluster()
    failure = status.ReplicaFailure("FailedCreateWorkerPod", "exceeded quota: team-a")
    cluster["status"] = observe(cluster, failure=failure, error=True)
    assert condition(cluster["status"], "ReplicaFailure")["message"] == "exceeded quota: team-a"  # type: ignore[index]
    assert condition(observe(cluster), "ReplicaFailure") is None


def test_only_a_change_that_matters_is_written() -> None:
    cluster = ray_cluster()
    first = cluster["status"] = observe(cluster)
    cluster["metadata"]["generation"] = 4
    assert not status.changed(first, observe(cluster, now=LATER))
    assert status.changed(first, observe(cluster, live(pods.head_pod(cluster)), now=LATER))


@pytest.mark.parametrize(
    ("replicas", "low", "high", "hosts", "expected"),
    [(2, 0, 5, 1, 2), (1, 3, 5, 1, 3), (9, 0, 5, 1, 5), (2, 0, 5, 2, 4)],
)
def test_replicas_stay_within_their_bounds(replicas: int, low: int, high: int, hosts: int, expected: int) -> None:
    group = {"replicas": replicas, "minReplicas": low, "maxReplicas": high, "numOfHosts": hosts}
    assert status.desired_workers(group) == expected
    assert status.desired_workers({**group, "suspend": True}) == 0


@pytest.mark.parametrize(
    ("phase", "restart", "state", "expected"),
    [
        ("Running", "Always", {"running": {}}, False),
        ("Failed", "Always", {}, True),
        ("Succeeded", "Never", {}, True),
        ("Running", "Always", {"terminated": {"exitCode": 1}}, False),
        ("Running", "Never", {"terminated": {"exitCode": 1}}, True),
        ("Pending", "Never", {"waiting": {}}, False),
    ],
)
def test_a_pod_that_ended_is_deleted(phase: str, restart: str, state: Object, expected: bool) -> None:
    pod = live(pods.head_pod(ray_cluster()), phase, containerStatuses=[{"name": "ray", "state": state}])
    pod["spec"]["restartPolicy"] = restart
    assert rounds.should_delete(pod) is expected


# Validation


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({}, None),
        ({"rayVersion": ""}, "RayVersion was not specified"),
        ({"rayVersion": "2.51.0"}, "minimum Ray version is 2.52.0"),
        ({"rayVersion": "2.51.0", "authOptions": None}, None),
        ({"headGroupSpec": {"template": {"spec": {"containers": []}}}}, "at least one container"),
    ],
)
def test_what_kuberay_refuses(spec: Object, problem: str | None) -> None:
    found = validation.spec_problem(ray_cluster(**spec))
    assert found is None if problem is None else problem in (found or "")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"maxReplicas": None}, "must set both minReplicas and maxReplicas"),
        ({"minReplicas": 3}, "minReplicas 3 greater than maxReplicas 2"),
        ({"rayStartParams": {"num-cpus": "1"}, "resources": {"CPU": "1"}}, "please use only one"),
        ({"rayStartParams": {"labels": "a=b"}}, "use the top-level Labels field"),
    ],
)
def test_what_kuberay_refuses_in_a_group(change: Object, problem: str) -> None:
    cluster = ray_cluster()
    cluster["spec"]["workerGroupSpecs"][0] |= change
    assert problem in (validation.spec_problem(cluster) or "")


@pytest.mark.parametrize(("name", "fine"), [("chat", True), ("9chat", False), ("a" * 53, True), ("a" * 54, False)])
def test_names_are_dns_1035_labels_of_53_characters(name: str, fine: bool) -> None:
    cluster = ray_cluster()
    cluster["metadata"]["name"] = name
    assert (validation.metadata_problem(cluster) is None) is fine
