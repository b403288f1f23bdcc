"""Structured logs: one JSON object per line, with the run it is about on every line of a pass."""

import json
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from dsft_operator.ports import Key

_run: ContextVar[dict[str, object] | None] = ContextVar("run", default=None)
_OWN = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}


@contextmanager
def about(key: Key) -> Generator[dict[str, object]]:
    """Lines written inside carry namespace and name, and what is put into the dict (uid, attempt)."""
    facts: dict[str, object] = {"namespace": key.namespace, "name": key.name}
    token = _run.set(facts)
    try:
        yield facts
    finally:
        _run.reset(token)


def also(**facts: object) -> None:
    """Add facts about the run to the lines that follow in this pass."""
    current = _run.get()
    if current is not None:
        current.update(facts)


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
            **(_run.get() or {}),
            **{name: value for name, value in record.__dict__.items() if name not in _OWN},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up(level: str) -> None:
    """Log to stderr, everything of ours from `level` on and of others from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("dsft_operator").setLevel(level.upper())
