"""The DeepSpeedFineTune resource: spec, status, conditions, and the contracts between operator and trainer.

Everything in this repository may import this package; it imports nothing of the others and does no I/O.
"""

GROUP = "dsft.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "DeepSpeedFineTune"
PLURAL = "deepspeedfinetunes"
SHORT_NAME = "dsft"
CHECKPOINT_REQUEST = f"{GROUP}/checkpoint-request"
"""The annotation that asks for a checkpoint. Any value that status.checkpointRequest does not echo yet is a request."""
