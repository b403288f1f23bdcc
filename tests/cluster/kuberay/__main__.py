"""Run the KubeRay stand-in: `python -m tests.cluster.kuberay [--mark-ready]`, on the cluster that KUBECONFIG names."""

import argparse
import logging

from kubernetes.config import new_client_from_config

from tests.cluster.kuberay.controller import Standin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mark-ready", action="store_true", help="no kubelet here: mark each pod as running and ready")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    Standin(new_client_from_config(), (lambda _: "127.0.0.1") if arguments.mark_ready else None).run()


if __name__ == "__main__":
    main()
