"""Two tenants whose runs train side by side: one of them may `edit` its namespace, and gets at nothing of the other's."""

import json

import pytest

from dsft_api import GROUP, PLURAL
from tests.cluster.kubectl import KubectlError
from tests.cluster.operator_install import NAMESPACE, Install
from tests.e2e.conftest import Tenants
from tests.e2e.manifests import ENDLESS, Assets, tiny_run
from tests.e2e.tenant import Tenant

pytestmark = pytest.mark.long
NAME = "tenant"
USER = "user"
# On a head, with the token of its environment, and without one.
_ASK = """
import json, os, sys, urllib.error, urllib.request as http
address, told = sys.argv[1], {}
paths = ["/api/jobs/", "/api/v0/nodes", "/api/v0/logs/file?node_id=x&filename=dsft-progress.json", "/api/actors/kill?actor_id=x"]
for whose, headers in (("none", {}), ("mine", {"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]})):
    for path in paths:
        for body in (None, b'{"entrypoint": "id"}') if path == "/api/jobs/" else (None,):
            request = http.Request(f"http://{address}:8265{path}", data=body, headers=headers)
            request.add_header("Content-Type", "application/json")
            try:
                answer = http.urlopen(request, timeout=30).status
            except urllib.error.HTTPError as error:
                answer = error.code
            told[f"{whose} {request.get_method()} {path.partition('?')[0]}"] = answer
print(json.dumps(told))
"""


def ask(tenant: Tenant, address: str) -> dict[str, int]:
    """What a Ray head answers to somebody who is on this tenant's head."""
    head = tenant.head(NAME)
    told = tenant.kubectl("exec", head, "--container=ray-head", "--", "python", "-c", _ASK, address)
    return json.loads(told)


def address_of(tenant: Tenant) -> str:
    head = tenant.head(NAME)
    return next(pod["status"]["podIP"] for pod in tenant.pods() if pod["metadata"]["name"] == head)


def allowed(tenant: Tenant, namespace: str, verb: str, what: str) -> bool:
    """Whether this tenant's user may do that, by the API server's word."""
    user = f"--as=system:serviceaccount:{tenant.namespace}:{USER}"
    resource, _, subresource = what.partition("/")
    options = [f"--subresource={subresource}"] if subresource else []
    try:
        tenant.kubectl.within(namespace)("auth", "can-i", verb, resource, user, *options)
    except KubectlError:
        return False
    return True


def test_one_tenant_gets_at_nothing_of_the_other(tenants: Tenants, operator: Install, assets: Assets) -> None:
    with tenants() as one, tenants() as other:
        for tenant in (one, other):
            tenant.apply(tiny_run(NAME, assets, steps=ENDLESS, nodes=1))
        one.kubectl("create", "serviceaccount", USER)
        subject = f"--serviceaccount={one.namespace}:{USER}"
        one.kubectl("create", "rolebinding", USER, "--clusterrole=edit", subject)
        _may_not_act_there(one, other)
        for tenant in (one, other):
            tenant.until_step(NAME, 1)
        _hears_nothing_from_the_other_head(one, other)
        _policy_admits_nobody_else(one, other)
        for tenant in (one, other):
            tenant.delete(NAME)
            tenant.until_nothing_left()


def _may_not_act_there(one: Tenant, other: Tenant) -> None:
    runs = f"{PLURAL}.{GROUP}"
    one.until("rights are aggregated", lambda: allowed(one, one.namespace, "create", runs), 60)
    for verb, what in (
        ("create", runs),
        ("get", runs),
        ("patch", runs),
        ("delete", runs),
        ("get", "secrets"),
        ("list", "secrets"),
        ("get", "rayclusters.ray.io"),
        ("create", "rayclusters.ray.io"),
        ("create", "pods/exec"),
        ("create", "pods/portforward"),
        ("get", "pods/log"),
        ("delete", "networkpolicies.networking.k8s.io"),
        ("create", "serviceaccounts/token"),
    ):
        assert not allowed(one, other.namespace, verb, what), (verb, what)
        assert not allowed(one, NAMESPACE, verb, what), (verb, what)
    assert not allowed(one, one.namespace, "patch", f"{runs}/status"), "the status is the operator's to write"


def _hears_nothing_from_the_other_head(one: Tenant, other: Tenant) -> None:
    mine = ask(one, address_of(one))
    assert mine["mine GET /api/jobs/"] == 200, "its own token opens its own head"
    theirs = ask(one, address_of(other))
    print(f"from one tenant's head to the other's: {theirs}")
    assert set(theirs.values()) <= {401, 403}
    assert {answer for name, answer in mine.items() if name.startswith("none")} <= {401, 403}


def _policy_admits_nobody_else(one: Tenant, other: Tenant) -> None:
    """Asserted as written: the network of a test cluster may enforce none."""
    (policy,) = one.kubectl.read("networkpolicies")["items"]
    status = one.status(NAME)
    assert status.ray_cluster is not None
    own = {"ray.io/cluster": status.ray_cluster.name}
    assert policy["spec"]["podSelector"] == {"matchLabels": own}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    peers = [peer for rule in policy["spec"]["ingress"] for peer in rule["from"]]
    namespaces = [peer.get("namespaceSelector") for peer in peers]
    assert namespaces == [None, {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}}]
    assert peers[0]["podSelector"] == {"matchLabels": own}
