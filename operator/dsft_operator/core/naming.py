"""Names and ids, each computed from the run alone: whoever asks again gets the same, so a repeated action finds itself.

A name says which run (uid) and which incarnation or attempt it belongs to; two operators at once can only collide, not double.
"""

import hashlib
import hmac

GROUP_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "dsft-operator"
RUN_LABEL = "dsft.dev/run"
RUN_UID_LABEL = "dsft.dev/run-uid"
TEMPLATE_ANNOTATION = "dsft.dev/template-digest"
FINALIZER = "dsft.dev/release-cluster"


def cluster_name(name: str, uid: str, incarnation: int) -> str:
    """`<name>-<uid5>`, and `-<n>` from the second one on: at most 50 of KubeRay's 53 characters."""
    first = f"{name}-{uid[:5]}"
    return first if incarnation == 1 else f"{first}-{incarnation}"


def preflight_name(name: str, uid: str, spec_digest: str) -> str:
    """`<name>-<uid5>-preflight-<digest6>`: one Job per spec; at most the 63 characters of a label, which its pods have it as."""
    return f"{name}-{uid[:5]}-preflight-{spec_digest.rpartition(':')[2][:6]}"


def submission_id(uid: str, attempt: int) -> str:
    """`<uid8>-a<n>`: Ray refuses a second submission of the same id."""
    return f"{uid[:8]}-a{attempt}"


def save_id(uid: str, attempt: int, value: str, answered: str | None) -> str:
    """`<uid8>-a<n>-save-<digest>`: one submission per attempt and request; `answered` before it, since a value may come back."""
    digest = hashlib.sha256(f"{answered}\n{value}".encode()).hexdigest()
    return f"{submission_id(uid, attempt)}-save-{digest[:8]}"


def ray_token(root_key: bytes, cluster_uid: str) -> str:
    """The Ray token of a cluster: HMAC-SHA256(root key, RayCluster uid), hex. Derived, so it is never read back."""
    return hmac.new(root_key, cluster_uid.encode(), hashlib.sha256).hexdigest()
