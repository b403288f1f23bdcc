"""A status with every field set. Data only."""

from typing import Any

TIME = "2026-01-01T00:00:00Z"


def condition(kind: str, status: str = "True", reason: str = "Training") -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": "", "lastTransitionTime": TIME}


CHECKPOINT = {
    "uri": "s3://b/p/checkpoints/step-00000200-a1.g1",
    "step": 200,
    "epoch": 0.5,
    "worldSize": 2,
    "bytes": 123_456_789_012,
    "time": TIME,
    "metrics": {"loss": 1.25, "accuracy": 1},
    "digest": "sha256:0",
}
SPENT = {"usefulSeconds": 5.5, "uncommittedSeconds": 1, "redoneSeconds": 2, "blockedSeconds": 0.1, "restartSeconds": 7}
WHOLE: dict[str, Any] = {
    "observedGeneration": 1,
    "phase": "Running",
    "phaseTime": TIME,
    "message": "step 210 of 400",
    "conditions": [condition("Ready"), condition("Succeeded", "Unknown")],
    "specHash": "sha256:1",
    "resolved": {"image": "r/t@sha256:2", "contract": 1, "modelRevision": "abc", "storagePrefix": "s3://b/p"},
    "attempt": 2,
    "preflight": {"job": "chat-12345-preflight-0", "startTime": TIME, "endTime": TIME},
    "interconnect": {"allGatherGBps": 91.5, "ranks": 16},
    "rayCluster": {"name": "chat-12345", "uid": "u", "incarnation": 1, "session": "session_1"},
    "job": {"submissionId": "12345678-a2", "state": "RUNNING"},
    "progress": {"step": 210, "totalSteps": 400, "epoch": 0.52, "percent": 52.5, "loss": 1.5, "learningRate": 1e-05},
    "evaluation": {"step": 200, "metrics": {"loss": 1.25}},
    "checkpointRequest": "now",
    "checkpoints": {
        "latest": CHECKPOINT,
        "best": CHECKPOINT,
        "retained": [CHECKPOINT],
        "damaged": ["step-00000100-a1.g1"],
    },
    "output": {"uri": "s3://b/p/export", "format": "safetensors", "bytes": 1, "digest": "sha256:3"},
    "attempts": [
        {"number": 1, "incarnation": 1, "startTime": TIME, "endTime": TIME, "fromStep": 0, "toStep": 200}
        | {"class": "WorkerLost", "nodes": ["n1"], "exitCode": 1, "message": "a worker was lost"}
        | {"evidence": "s3://b/p/logs/attempt-1/last-lines-driver.txt", "failedNodes": ["n1"]},
        {"number": 2, "incarnation": 1, "startTime": TIME, "fromStep": 200, "nodes": ["n1"], "gpus": 8, "spent": SPENT}
        | {"restarts": 1, "losses": [{"class": "Hang", "step": 205, "time": TIME, "message": "no step in 60 s"}]},
    ],
    "avoidedNodes": ["n1"],
    "retries": 1,
    "retryToken": "again",
    "usage": {"trainedSeconds": 5.5, "gpuSeconds": 10.5, "wastedGpuSeconds": 0.5, "goodput": 0.95}
    | {"usefulSeconds": 5.5, "redoneSeconds": 1, "waitingSeconds": 2, "waitingSince": TIME}
    | {"blockedSeconds": 0.1, "restartSeconds": 7},
    "startTime": TIME,
    "completionTime": TIME,
    "logs": {"uri": "s3://b/p/logs"},
}
