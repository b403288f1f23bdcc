"""Manifests by which a tenant would get more than the admin gave: what is written, how it would work, what refuses it.

The tenant may create DeepSpeedFineTunes in its namespace and nothing else. The table is tried as values here and on the
real API server by tests/apiserver/test_confinement.py.
"""

from typing import Any, NamedTuple

Json = dict[str, Any]

# The admin's row for the namespaces of tenants.
POLICY: Json = {
    "namespaces": ["tenant-*"],
    "images": ["registry.corp/ml/*"],
    "serviceAccounts": ["default", "trainer"],
    "storage": ["s3://ml-runs/{namespace}/*", "file:///data/*"],
    "endpoints": ["https://s3.corp/*"],
    "sources": ["hf://org/*", "s3://ml-runs/{namespace}/*", "!hf://org/secret-*"],
    "trustRemoteCode": ["hf://org/with-code@0123456789abcdef0123456789abcdef01234567"],
    "startFrom": ["*", "!admin-*"],
    "programs": ["ours.*"],
    "dns": False,
    "storageClasses": ["scratch-*"],
    "maxKeepClusterSeconds": 3600,
    "secrets": ["run-*"],
    "configMaps": ["run-*"],
    "volumeClaims": ["run-*"],
    "schedulers": ["default-scheduler"],
    "podLabels": ["team"],
    "queues": ["{namespace}"],
    "queueRequired": True,
    "maxGpus": 16,
    "maxNodes": 4,
    "maxRunSeconds": 86400,
}

POOL: Json = {"name": "gpu", "nodes": 2, "gpusPerNode": 8}


def legal(namespace: str) -> Json:
    """A spec that uses all that the policy gives."""
    return {
        "model": {"uri": "hf://org/model", "task": "sequence-classification"},
        "data": {"train": {"uri": f"s3://ml-runs/{namespace}/data", "format": "classification"}},
        "training": {"epochs": 1, "globalBatchSize": 16, "optimizer": {"learningRate": 1e-4}},
        "storage": {
            "uri": f"s3://ml-runs/{namespace}/runs",
            "endpointUrl": "https://s3.corp/",
            "credentials": {"secretName": "run-s3"},
        },
        "image": {"trainer": "registry.corp/ml/trainer:1", "pullSecrets": [{"name": "run-pull"}]},
        "serviceAccountName": "trainer",
        "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "run-hf", "key": "token"}}}],
        "nodePools": [
            {
                **POOL,
                "runtimeClassName": "nvidia",
                "priorityClassName": "batch",
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                "resources": {"limits": {"cpu": 8, "memory": "64Gi", "rdma/hca": 1}},
                "podTemplate": {
                    "metadata": {
                        "labels": {"team": "a"},
                        "annotations": {"kueue.x-k8s.io/podset-required-topology": "rack"},
                    },
                    "spec": {"affinity": {}, "schedulerName": "default-scheduler"},
                },
            }
        ],
        "queue": {"name": namespace},
        "deadlines": {"runSeconds": 3600},
    }


class Escape(NamedTuple):
    """What is changed of the legal spec, the way it would work, and the words of the refusal."""

    change: Json
    way: str
    words: str


def _pool(**fields: Any) -> Json:
    return {"nodePools": [{**POOL, **fields}]}


def _template(**spec: Any) -> Json:
    return _pool(podTemplate={"spec": spec})


def _meta(**metadata: Any) -> Json:
    return _pool(podTemplate={"metadata": metadata})


def _env(name: str, **value: Any) -> Json:
    return {"env": [{"name": name, **(value or {"value": "/scratch/x"})}]}


def _storage(**fields: Any) -> Json:
    return {"storage": {"uri": "s3://ml-runs/{namespace}/runs", **fields}}


def _container(**fields: Any) -> Json:
    return {"name": "x", "image": "registry.corp/ml/x:1", **fields}


_NOT_HERE = "is not allowed in this namespace"
_NEVER = "may not be set"

ESCAPES: dict[str, Escape] = {
    # The pod and its node
    "privileged container": Escape(
        _template(containers=[_container(securityContext={"privileged": True})]), "root on the node", "Extra inputs"
    ),
    "sidecar": Escape(_template(containers=[_container()]), "code that nobody allowed beside Ray", _NOT_HERE),
    "init container": Escape(_template(initContainers=[_container()]), "code before Ray, in its volumes", _NOT_HERE),
    "Ray's container replaced": Escape(
        _template(containers=[_container(name="ray-worker")]), "KubeRay merges by name", "is taken"
    ),
    "ephemeral container": Escape(_template(ephemeralContainers=[_container()]), "code in a running pod", _NEVER),
    "pod security context": Escape(_template(securityContext={"runAsUser": 0}), "root in the container", _NEVER),
    "host path": Escape(
        _template(volumes=[{"name": "host", "hostPath": {"path": "/"}}]), "the node's disk and its keys", _NEVER
    ),
    "projected token": Escape(
        _template(volumes=[{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]),
        "the ServiceAccount's rights",
        _NEVER,
    ),
    "token of the account": Escape(_template(automountServiceAccountToken=True), "the account's rights", _NEVER),
    "account by the template": Escape(_template(serviceAccountName="admin"), "the account's rights", _NEVER),
    "host network": Escape(_template(hostNetwork=True), "the node's identity, past every NetworkPolicy", _NOT_HERE),
    "host processes": Escape(_template(hostPID=True), "other tenants' environments by /proc", _NEVER),
    "host IPC": Escape(_template(hostIPC=True), "other tenants' shared memory", _NEVER),
    "host users": Escape(_template(hostUsers=True), "out of the user namespace", _NEVER),
    "a node by name": Escape(_template(nodeName="control-plane"), "past the scheduler, taints and quotas", _NEVER),
    "process namespace": Escape(_template(shareProcessNamespace=True), "the memory of other containers", _NEVER),
    "runtime class": Escape(_pool(runtimeClassName="kata-off"), "out of the sandbox the admin chose", _NOT_HERE),
    "runtime class by the template": Escape(_template(runtimeClassName="kata-off"), "the same", _NEVER),
    "priority class": Escape(_pool(priorityClassName="system-node-critical"), "preempts the node's own", _NOT_HERE),
    "control plane taint": Escape(
        _pool(tolerations=[{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}]),
        "a pod beside the cluster's keys",
        _NOT_HERE,
    ),
    "every taint": Escape(_pool(tolerations=[{"operator": "Exists"}]), "the same, without its name", _NOT_HERE),
    "every taint for the head": Escape(
        {"head": {"tolerations": [{"operator": "Exists"}]}}, "the same, for the head", _NOT_HERE
    ),
    "cordoned nodes": Escape(
        _pool(tolerations=[{"key": "node.kubernetes.io/unschedulable"}]), "runs where nothing should", _NOT_HERE
    ),
    "scheduler": Escape(_template(schedulerName="mine"), "past the scheduler that counts", _NOT_HERE),
    "apparmor annotation": Escape(
        _meta(annotations={"container.apparmor.security.beta.kubernetes.io/ray-worker": "unconfined"}),
        "out of the profile",
        _NOT_HERE,
    ),
    "cloud role annotation": Escape(
        _meta(annotations={"iam.amazonaws.com/role": "admin"}), "kube2iam gives that role", _NOT_HERE
    ),
    "injector annotation": Escape(
        _meta(annotations={"vault.hashicorp.com/agent-inject": "true"}), "a webhook adds a container", _NOT_HERE
    ),
    "workload identity label": Escape(
        _meta(labels={"azure.workload.identity/use": "true"}), "a webhook adds a token", _NOT_HERE
    ),
    "label of a Service": Escape(_meta(labels={"app": "checkout"}), "gets the traffic of that Service", _NOT_HERE),
    "label of another cluster": Escape(
        _meta(labels={"ray.io/cluster": "theirs"}), "inside another run's NetworkPolicy", _NOT_HERE
    ),
    "label of the operator": Escape(
        _meta(labels={"app.kubernetes.io/name": "dsft-operator"}), "taken for the operator by dashboards", _NOT_HERE
    ),
    "anti-affinity to everybody": Escape(
        _template(
            affinity={
                "podAntiAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": [
                        {"labelSelector": {}, "namespaceSelector": {}, "topologyKey": "kubernetes.io/os"}
                    ]
                }
            }
        ),
        "no pod of anybody is scheduled any more",
        "speaks of pods of other namespaces",
    ),
    "affinity that is none": Escape(_template(affinity="x"), "the operator stumbles over it", "valid dictionary"),
    "a name server of one's own": Escape(
        _template(dnsConfig={"nameservers": ["6.6.6.6"]}), "another server by an allowed name", _NOT_HERE
    ),
    "a host of one's own": Escape(
        _template(hostAliases=[{"ip": "6.6.6.6", "hostnames": ["s3.corp"]}]), "the same", _NOT_HERE
    ),
    "a device as GPU": Escape(_pool(gpuResource="devices.kubevirt.io/kvm"), "the node's virtualisation", _NOT_HERE),
    "a storage class": Escape(
        _pool(scratch={"size": "1Ti", "storageClassName": "gold"}), "disks that others pay", _NOT_HERE
    ),
    "a quantity that is none": Escape(
        _pool(resources={"limits": {"memory": "1e1.5"}}), "KubeRay can read no RayCluster any more", "pattern"
    ),
    # Identities and secrets
    "another account": Escape({"serviceAccountName": "deployer"}, "its rights, and its cloud role", _NOT_HERE),
    "Secret by env": Escape(
        _env("X", valueFrom={"secretKeyRef": {"name": "db", "key": "password"}}), "reads it in the pod", _NOT_HERE
    ),
    "all keys of a Secret": Escape({"envFrom": [{"secretRef": {"name": "db"}}]}, "reads it in the pod", _NOT_HERE),
    "Secret as credentials": Escape(
        _storage(credentials={"secretName": "other-s3"}), "writes as another team", _NOT_HERE
    ),
    "token of another run": Escape(
        _env("X", valueFrom={"secretKeyRef": {"name": "chat-0a1b2", "key": "auth_token"}}),
        "code in that run, by its dashboard",
        _NOT_HERE,
    ),
    "pull secret": Escape({"image": {"pullSecrets": [{"name": "db"}]}}, "pulls what it may not read", _NOT_HERE),
    "ConfigMap by env": Escape({"envFrom": [{"configMapRef": {"name": "app"}}]}, "reads it in the pod", _NOT_HERE),
    "ConfigMap as chat template": Escape(
        {
            "model": {"uri": "hf://org/model", "task": "causal-lm"},
            "data": {
                "train": {"uri": "s3://ml-runs/{namespace}/data", "format": "messages"},
                "chatTemplate": {"configMapRef": {"name": "app", "key": "password"}},
            },
        },
        "reads it in the pod",
        _NOT_HERE,
    ),
    "certificates": Escape(_storage(caBundle={"configMapName": "mine"}), "trusts a server that listens in", _NOT_HERE),
    "field of the pod": Escape(
        _env("X", valueFrom={"fieldRef": {"fieldPath": "spec.nodeName"}}), "reads what it may not", "exactly one"
    ),
    "secret in the resource": Escape(
        _env("S3_SECRET", value="hunter2"), "whoever reads the resource reads it", "looks like"
    ),
    # Storage, models, images
    "another namespace's storage": Escape(
        {"storage": {"uri": "s3://ml-runs/tenant-b/runs"}}, "reads and overwrites their checkpoints", _NOT_HERE
    ),
    "a prefix that looks alike": Escape(
        {"storage": {"uri": "s3://ml-runs/{namespace}-b/runs"}}, "the same, past a careless comparison", _NOT_HERE
    ),
    "a path that goes up": Escape(
        {"storage": {"uri": "s3://ml-runs/{namespace}/../tenant-b"}}, "the same, by ..", "has a part that is . or .."
    ),
    "a percent-encoded way up": Escape(
        {"storage": {"uri": "s3://ml-runs/%2e%2e/tenant-b"}}, "the same, decoded by a server", _NOT_HERE
    ),
    "a tab in the path": Escape(
        {"storage": {"uri": "s3://ml-runs/{namespace}/.\t./tenant-b"}},
        "the same, once the tab is dropped",
        "not read alike",
    ),
    "an empty part of the path": Escape(
        {"storage": {"uri": "s3://ml-runs/{namespace}//x"}}, "past a refused folder", "not read alike"
    ),
    "an encoded way up on a volume": Escape(
        {"storage": {"uri": "file:///data/%2e%2e/x", "volume": {"claimName": "run-x", "mountPath": "/data"}}},
        "the same, decoded by the trainer",
        "has a part that is . or ..",
    ),
    "the whole bucket": Escape({"storage": {"uri": "s3://ml-runs"}}, "every tenant's folder below it", _NOT_HERE),
    "another claim": Escape(
        {"storage": {"uri": "file:///data/x", "volume": {"claimName": "db", "mountPath": "/data"}}},
        "another application's disk",
        _NOT_HERE,
    ),
    "another claim as cache": Escape(_pool(modelCache={"claimName": "db"}), "the same", _NOT_HERE),
    "a claim over the code": Escape(
        {"storage": {"uri": "file:///opt/x", "volume": {"claimName": "run-x", "mountPath": "/opt/venv"}}},
        "its files in the place of the trainer",
        "a folder of the system",
    ),
    "a claim over the code, spelled otherwise": Escape(
        {"storage": {"uri": "file:///data/x", "volume": {"claimName": "run-x", "mountPath": "//opt/venv"}}},
        "the same",
        "a folder of the system",
    ),
    "a claim over the home": Escape(
        {"storage": {"uri": "file:///data/x", "volume": {"claimName": "run-x", "mountPath": "/home/trainer"}}},
        "an .aws/config with a command in it",
        "a folder of the system",
    ),
    "a key that is a path": Escape(
        _storage(caBundle={"configMapName": "run-ca", "key": "../../../scratch/x"}), "another file", "pattern"
    ),
    "AWS in the place of the admin's storage": Escape(_storage(), "a bucket of that name that anybody owns", _NOT_HERE),
    "a secret in the endpoint": Escape(
        _storage(endpointUrl="https://s3.corp/$(X)"), "Kubernetes fills it in", "pattern"
    ),
    "another endpoint": Escape(_storage(endpointUrl="http://169.254.169.254/"), "the node's cloud identity", _NOT_HERE),
    "credentials in the endpoint": Escape(
        _storage(endpointUrl="https://user:word@s3.corp/"), "a secret in the status", "endpointUrl"
    ),
    "another model": Escape(
        {"model": {"uri": "hf://evil/model", "task": "sequence-classification"}}, "weights nobody checked", _NOT_HERE
    ),
    "a model that is kept": Escape(
        {"model": {"uri": "hf://org/secret-model", "task": "sequence-classification"}}, "with a shared token", _NOT_HERE
    ),
    "code of a model": Escape(
        {"model": {"uri": "hf://org/model", "task": "sequence-classification", "trustRemoteCode": True}},
        "runs code of the model's repository",
        _NOT_HERE,
    ),
    "a model's code as it is today": Escape(
        {
            "model": {
                "uri": "hf://org/with-code",
                "revision": "main",
                "task": "sequence-classification",
                "trustRemoteCode": True,
            }
        },
        "the admin looked at another commit",
        _NOT_HERE,
    ),
    "another team's data": Escape(
        {"data": {"train": {"uri": "s3://ml-runs/tenant-b/data", "format": "classification"}}},
        "with a key that reads both",
        _NOT_HERE,
    ),
    "another run's pickles": Escape({"startFrom": {"run": "admin-run"}}, "code of whoever wrote them", _NOT_HERE),
    "another image": Escape({"image": {"trainer": "docker.io/evil/trainer:1"}}, "a miner", _NOT_HERE),
    "an image that looks alike": Escape(
        {"image": {"trainer": "registry.corp.evil.io/ml/trainer:1"}}, "past a careless comparison", _NOT_HERE
    ),
    "an image of the default registry": Escape({"image": {"trainer": "evil/miner"}}, "docker.io is added", _NOT_HERE),
    "a program of Python's own": Escape(
        {
            "model": None,
            "data": None,
            "training": None,
            "program": {"entrypoint": "subprocess:check_call", "config": {"/bin/sh": 1}},
        },
        "any command",
        _NOT_HERE,
    ),
    "a program of Python's own for the data": Escape(
        {
            "model": None,
            "data": None,
            "training": None,
            "program": {"entrypoint": "ours.train:run", "datasets": "subprocess:check_call"},
        },
        "any command, on the head",
        _NOT_HERE,
    ),
    "a program from elsewhere": Escape(
        {
            "model": None,
            "data": None,
            "training": None,
            "program": {
                "entrypoint": "ours.train:run",
                "source": {"archive": "s3://ml-runs/tenant-b/code.zip", "digest": f"sha256:{'0' * 64}"},
            },
        },
        "its modules before those of the image",
        _NOT_HERE,
    ),
    "a program from somebody's Git": Escape(
        {
            "model": None,
            "data": None,
            "training": None,
            "program": {
                "entrypoint": "ours.train:run",
                "source": {"git": "https://git.corp.evil.io/ml/code", "rev": "0" * 40},
            },
        },
        "its modules before those of the image",
        _NOT_HERE,
    ),
    # The environment of what runs
    "preloaded library": Escape(_env("LD_PRELOAD"), "code in every process, the drain too", "is set by the operator"),
    "python path": Escape(_env("PYTHONPATH"), "its modules in the place of the trainer's", "is set by the operator"),
    "python's warnings": Escape(
        _env("PYTHONWARNINGS"), "import a module that starts a command", "is set by the operator"
    ),
    "home": Escape(_env("HOME"), "an .aws/config with a command in it", "is set by the operator"),
    "path": Escape(_env("PATH"), "its python in the place of ours", "is set by the operator"),
    "Ray without a token": Escape(
        _env("RAY_AUTH_MODE", value="disabled"), "an open dashboard", "is set by the operator"
    ),
    "another Ray": Escape(_env("RAY_ADDRESS"), "joins another cluster", "is set by the operator"),
    "S3's own endpoint": Escape(
        _env("AWS_ENDPOINT_URL_S3", value="http://evil"), "sends requests past spec.storage", "is set by the operator"
    ),
    "AWS profile": Escape(_env("AWS_CONFIG_FILE"), "a credential_process is a command", "is set by the operator"),
    "another role": Escape(_env("AWS_ROLE_ARN", value="arn:x"), "another identity", "is set by the operator"),
    "the job": Escape(_env("DSFT_JOB", value="{}"), "another job than the one judged", "is set by the operator"),
    # Bounds
    "more GPUs": Escape(_pool(gpusPerNode=9), "starves the others", "16 GPUs at most"),
    "GPUs as a plain resource": Escape(_pool(resources={"limits": {"nvidia.com/gpu": 64}}), "not counted", _NOT_HERE),
    "GPUs for the head": Escape({"head": {"resources": {"limits": {"nvidia.com/gpu": 8}}}}, "not counted", _NOT_HERE),
    "many small nodes": Escape(_pool(nodes=5, gpusPerNode=1), "starves the others", "4 nodes at most"),
    "a long run": Escape({"deadlines": {"runSeconds": 86401}}, "holds its GPUs", "86400 seconds at most"),
    "a cluster that is kept": Escape({"keepClusterSeconds": 3601}, "holds its GPUs", "3600 seconds at most"),
    "another scheduler": Escape(
        {"queue": {"name": "{namespace}", "scheduler": "volcano"}}, "past Kueue, which does not look at it", _NOT_HERE
    ),
    "the priority of the node's own": Escape(
        {"queue": {"name": "{namespace}", "priorityClass": "system-node-critical"}}, "preempts everybody", _NOT_HERE
    ),
    "no queue": Escape({"queue": None}, "past Kueue", "wait in a queue"),
    "another team's queue": Escape({"queue": {"name": "tenant-b"}}, "their quota", _NOT_HERE),
}


def escape_spec(name: str, namespace: str) -> Json:
    """The spec of an escape in a namespace; a part that is None is left out."""
    spec = {**legal(namespace), **_named(ESCAPES[name].change, namespace)}
    return {key: value for key, value in spec.items() if value is not None}


def _named(value: Any, namespace: str) -> Any:
    if isinstance(value, dict):
        return {key: _named(item, namespace) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item, namespace) for item in value]
    return value.replace("{namespace}", namespace) if isinstance(value, str) else value
