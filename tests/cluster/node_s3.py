"""The cluster's S3 server: tests/s3_server.py on an address that pods reach. This process holds it and ends with it.

`python -m tests.cluster.node_s3 ADDRESS FOLDER` writes `endpoint` into the folder once the server answers and has its bucket.
"""

import signal
import sys
from pathlib import Path

from tests.s3_server import S3Server

BUCKET = "dsft"


def main(address: str, folder: Path) -> None:
    # SIGTERM ends sigwait below instead of the process, so that the server ends first.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    server = S3Server.start(folder / "server", address)
    try:
        server.make_bucket(BUCKET)
        (folder / "endpoint").write_text(server.endpoint)
        signal.sigwait({signal.SIGTERM})
    finally:
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
