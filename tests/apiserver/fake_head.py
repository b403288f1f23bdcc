"""A Ray head's HTTP API without Ray: jobs that move on by themselves, and the trainer's progress document.

Answers as Ray 2.60 does where the operator looks (status codes, plain-text 404, 500 for a second submission of an id).
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dsft_api.job import JOB_ENV, Job
from dsft_api.progress import Progress, TrainerPhase
from tests.unit.operator.situations import OUTPUT, told

STEPS = 3
NO_FILE = "A file is not found at: dsft-progress.json"


@dataclass
class FakeHead:
    """What the head knows. A job makes a step per look.

    `hold`: jobs run and tell nothing. `stay`: they tell of this phase, and stay in it. `deaf`: they do not stop when asked.
    """

    session: str = "session-1"
    jobs: dict[str, str] = field(default_factory=dict[str, str])
    ends: dict[str, float] = field(default_factory=dict[str, float])  # milliseconds since 1970, as Ray has it
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    posts: list[str] = field(default_factory=list[str])
    authorizations: set[str] = field(default_factory=set[str])
    paths: set[str] = field(default_factory=set[str])
    progress: Progress | None = None
    step: int = 0
    hold: bool = False
    stay: TrainerPhase | None = None
    deaf: bool = False
    last_words: str | None = None  # of a driver that failed, with exit code 5
    on_step: Callable[["FakeHead"], None] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    server: ThreadingHTTPServer | None = None

    def start(self, address: str = "127.0.0.1", port: int = 0) -> int:
        """Serve on a port of loopback, by default a free one; the port."""
        head = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with head.lock:
                    head.authorizations.add(self.headers.get("Authorization", ""))
                    head.paths.add(self.path)
                    self._answer(*head.get(self.path))

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                with head.lock:
                    head.paths.add(self.path)
                    self._answer(*head.post(self.path, body))

            def _answer(self, status: int, content: str) -> None:
                payload = content.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer((address, port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self.server.server_port

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()

    def restart(self) -> None:
        """A new session that knows no jobs."""
        with self.lock:
            self.session = f"{self.session}+"
            self.jobs.clear()
            self.progress = None

    def get(self, path: str) -> tuple[int, str]:
        if path == "/api/version":
            return 200, json.dumps({"version": "4", "ray_version": "2.60.0", "session_name": self.session})
        if path.startswith("/api/v0/nodes"):
            rows = [{"node_id": "ab" * 28, "is_head_node": True, "state": "ALIVE"}]
            return 200, json.dumps({"result": True, "data": {"result": {"result": rows}}})
        if path.startswith("/api/v0/logs/file"):
            return (200, self.progress.model_dump_json(by_alias=True)) if self.progress else (500, NO_FILE)
        submission = path.rpartition("/")[2]
        if submission not in self.jobs:
            return 404, f"Job {submission} does not exist"
        if self.last_words is not None:
            self.jobs[submission] = "FAILED"
        else:
            self._move(submission)
        state = self.jobs[submission]
        over = state not in ("PENDING", "RUNNING")
        ended = self.ends.setdefault(submission, 1000 * time.time()) if over else None
        code = 5 if self.last_words is not None else None
        told = {"status": state, "message": self.last_words or "", "driver_exit_code": code, "end_time": ended}
        return 200, json.dumps(told)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        if path.endswith("/stop"):
            submission = path.split("/")[-2]
            stopped = self.jobs.get(submission) in ("PENDING", "RUNNING")
            if stopped and not self.deaf:
                self.jobs[submission] = "STOPPED"
                if self.progress is not None:
                    self.progress = self.progress.model_copy(update={"phase": TrainerPhase.INTERRUPTED})
            return 200, json.dumps({"stopped": stopped})
        submission = body["submission_id"]
        self.posts.append(submission)
        if submission in self.jobs:
            return 500, (
                f"Traceback ...\nValueError: Job with submission_id {submission} already exists. "
                "Please use a different submission_id."
            )
        self.bodies.append(body)
        self.jobs[submission] = "PENDING"
        return 200, json.dumps({"job_id": submission, "submission_id": submission})

    def _move(self, submission: str) -> None:
        job = Job.model_validate_json(self._body(submission)["runtime_env"]["env_vars"][JOB_ENV])
        if self.jobs[submission] == "PENDING":
            self.jobs[submission] = "RUNNING"
        elif self.jobs[submission] == "RUNNING" and not self.hold:
            self.step += 1 if self.stay is None else 0
            over = self.step >= STEPS
            phase = self.stay or (TrainerPhase.SUCCEEDED if over else TrainerPhase.TRAINING)
            self.progress = told(phase, job.attempt, step=self.step, committed=self.step).model_copy(
                update={"run_uid": job.run.uid, "output": OUTPUT if over else None}
            )
            if over:
                self.jobs[submission] = "SUCCEEDED"
            if self.on_step is not None:
                self.on_step(self)

    def _body(self, submission: str) -> dict[str, Any]:
        return next(body for body in self.bodies if body["submission_id"] == submission)
