"""What the operator's Deployment asks of the kubelet."""

from dsft_operator.install import manifests


def test_a_slow_start_is_no_failure() -> None:
    """As on a node whose pods all come back at once after a drain: liveness counts from when it is up."""
    (deployment,) = [each for each in manifests("image", {}) if each["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    startup = container["startupProbe"]
    assert startup["httpGet"] == container["livenessProbe"]["httpGet"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
