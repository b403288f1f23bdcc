"""Ask the run on this Ray cluster, through its Relay actor, for a commit.

`drain`: commit and stop; waits until it has. The preStop hook of every Ray pod. Where there is no run, or nothing answers, there
is nothing to wait for. `save`: commit and go on; what a submission of the operator's does when somebody asked for a checkpoint.
"""

import os
import socket
import sys
import threading
import time
from typing import Any

from dsft_api.job import SAVE_ENV

DRAIN_SECONDS_ENV = "DSFT_DRAIN_SECONDS"
RAY_ADDRESS_ENV = "RAY_ADDRESS"
POLL_SECONDS = 0.5
ANSWER_SECONDS = 10.0
# A head that can't be reached for so long is gone, and the run with it. Ray itself would try for minutes, in which a node that
# is wanted elsewhere waits.
HEAD_GONE_SECONDS = 4.0


def drain() -> int:
    """Wait until every run on the cluster ended, DSFT_DRAIN_SECONDS at most; always exit code 0."""
    if address := os.environ.get(RAY_ADDRESS_ENV):
        threading.Thread(target=_end_without_head, args=(address,), daemon=True).start()
    import ray

    deadline = time.monotonic() + float(os.environ.get(DRAIN_SECONDS_ENV, "300"))
    try:
        relays = _relays()
        ray.get([relay.request_drain.remote() for relay in relays], timeout=ANSWER_SECONDS)
        while relays and time.monotonic() < deadline:
            relays = [relay for relay in relays if ray.get(relay.outcome.remote(), timeout=ANSWER_SECONDS) is None]
            time.sleep(POLL_SECONDS)
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        # Also the way in which a run's end looks from here: its Relay ends with it.
        sys.stderr.write(f"nothing to drain: {error}\n")
    return 0


def save() -> int:
    """Pass the request in DSFT_SAVE on; exit code 1 where no run takes it. It is answered in the progress document."""
    import ray

    value = os.environ.get(SAVE_ENV)
    if not value:
        sys.stderr.write(f"{SAVE_ENV} is not set: it is what the run answers with\n")
        return 2
    try:
        relays = _relays()
        ray.get([relay.request_save.remote(value) for relay in relays], timeout=ANSWER_SECONDS)
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        sys.stderr.write(f"the run could not be asked: {error}\n")
        return 1
    sys.stderr.write("" if relays else "no run here takes a request\n")
    return 0 if relays else 1


def _relays() -> list[Any]:
    """Those of runs whose ranks look whether something is asked of them."""
    import ray

    from dsft_trainer.runtime.ray_relay import NAMESPACE, RELAY_PREFIX

    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    names = [name for name in ray.util.list_named_actors() if name.startswith(RELAY_PREFIX)]
    relays = [ray.get_actor(name) for name in names]
    return [relay for relay in relays if ray.get(relay.drains.remote(), timeout=ANSWER_SECONDS)]


def _end_without_head(address: str) -> None:
    """End this process once nothing has listened at HOST:PORT for a while."""
    host, _, port = address.rpartition(":")
    seen = time.monotonic()
    while time.monotonic() - seen < HEAD_GONE_SECONDS:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            pass
        else:
            seen = time.monotonic()
        time.sleep(POLL_SECONDS)
    sys.stderr.write(f"nothing to drain: the head at {address} is gone\n")
    os._exit(0)
