"""A double of an MLflow tracking server: the requests of its REST API that the trainer's tracker makes, kept in memory."""

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.http_double import HttpDouble, QuietHandler

API = "/api/2.0/mlflow/"


@dataclass
class TrackedRun:
    """One run."""

    id: str
    experiment: str
    name: str
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, int, float]] = field(default_factory=list)

    def to_wire(self) -> dict[str, Any]:
        info = {"run_id": self.id, "run_uuid": self.id, "experiment_id": self.experiment, "status": self.status}
        info |= {"run_name": self.name, "start_time": 0, "lifecycle_stage": "active", "artifact_uri": "none"}
        tags = [{"key": key, "value": value} for key, value in self.tags.items()]
        return {"run": {"info": info, "data": {"tags": tags}}}


class MlflowServer(HttpDouble):
    """Serves on a free port while in its block. `refuse`: answers everything with 403 and this text."""

    def __init__(self, refuse: str | None = None) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, TrackedRun] = {}
        self.refuse = refuse
        super().__init__(self._handler())

    def answer(self, path: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.refuse is not None:
            return 403, {"error_code": "PERMISSION_DENIED", "message": self.refuse}
        match path:
            case "experiments/get-by-name":
                name = asked["experiment_name"]
                if name not in self.experiments:
                    return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}
                return 200, {"experiment": {"experiment_id": self.experiments[name], "name": name}}
            case "experiments/create":
                self.experiments[asked["name"]] = str(len(self.experiments) + 1)
                return 200, {"experiment_id": self.experiments[asked["name"]]}
            case "runs/search":
                found = [run for run in self.runs.values() if f"'{run.tags['dsft.uid']}'" in asked["filter"]]
                return 200, {"runs": [run.to_wire()["run"] for run in found]}
            case "runs/create":
                run = TrackedRun(f"{len(self.runs):032x}", asked["experiment_id"], asked["run_name"])
                run.tags = {tag["key"]: tag["value"] for tag in asked["tags"]}
                self.runs[run.id] = run
                return 200, run.to_wire()
            case "runs/get":
                return 200, self.runs[asked["run_id"]].to_wire()
            case "runs/update":
                self.runs[asked["run_id"]].status = asked["status"]
                return 200, {"run_info": self.runs[asked["run_id"]].to_wire()["run"]["info"]}
            case "runs/log-batch":
                run = self.runs[asked["run_id"]]
                run.metrics += [(item["key"], int(item["step"]), item["value"]) for item in asked.get("metrics", ())]
                run.params |= {item["key"]: item["value"] for item in asked.get("params", ())}
                return 200, {}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": path}

    def _handler(self) -> type[QuietHandler]:
        server = self

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
                self._answer(query | json.loads(self.body() or b"{}"))

            def do_POST(self) -> None:
                self._answer(json.loads(self.body()))

            def _answer(self, asked: dict[str, Any]) -> None:
                code, answer = server.answer(urlsplit(self.path).path.removeprefix(API), asked)
                self.reply(code, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        return Handler
