"""Processes of the test cluster: started with a log and a record, awaited with a bound, and ended however the run ended.

A process dies with the one that started it (the kernel sees to that), unless it is meant to stay. What stays is recorded
as `<folder>/<name>.pid` with its start time, so that a later run ends it and never takes a reused pid for it.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.05


@dataclass
class Process:
    """One running program. Its output is in `<folder>/<name>.log`."""

    folder: Path
    name: str
    popen: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls,
        folder: Path,
        name: str,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        stays: bool = False,
    ) -> "Process":
        """Start it in `folder`. `env` is added to ours. Start from the main thread: it dies with the starting thread.

        `stays`: it outlives us, until `end_recorded`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.log").open("ab") as log:
            popen = subprocess.Popen(
                [*([] if stays else dies_with_us()), *map(str, argv)],
                cwd=folder,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the tests, which then end this in their own order.
                start_new_session=True,
            )
        process = cls(folder, name, popen)
        process._record.write_text(f"{popen.pid} {_start_time(popen.pid)}")
        return process

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait for a condition that this process brings about.

        Raises:
            RuntimeError: with the end of its log, if it ends first or the time is over.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.running:
                raise RuntimeError(f"{self.name} ended with exit code {self.popen.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} was not ready after {seconds:.0f} s:\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def stop(self, grace: float = 10.0) -> None:
        """End it: SIGTERM, and SIGKILL after `grace` seconds."""
        if self.running:
            self.popen.terminate()
            try:
                self.popen.wait(grace)
            except subprocess.TimeoutExpired:
                self.kill()
        self._record.unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL, as when a machine goes away."""
        self.popen.kill()
        self.popen.wait(10)
        self._record.unlink(missing_ok=True)

    def log_tail(self, size: int = 3000) -> str:
        """The last characters of its log."""
        return (self.folder / f"{self.name}.log").read_text(errors="replace")[-size:]

    @property
    def _record(self) -> Path:
        return self.folder / f"{self.name}.pid"


def recorded(folder: Path) -> dict[str, int]:
    """Pids, by name, of the processes recorded in `folder` that still run."""
    found: dict[str, int] = {}
    for record in sorted(folder.glob("*.pid")):
        pid, _, start = record.read_text().partition(" ")
        # A record that was cut off by a kill names nothing.
        if pid.isdigit() and start and _start_time(int(pid)) == start:
            found[record.stem] = int(pid)
    return found


def end_recorded(folder: Path, grace: float = 10.0) -> list[str]:
    """End what an earlier run left running, the last started first; the names of what was ended."""
    running = recorded(folder)
    last_first = sorted(running, key=lambda name: (folder / f"{name}.pid").stat().st_mtime_ns, reverse=True)
    for name in last_first:
        _end(running[name], grace)
        (folder / f"{name}.pid").unlink()
    return last_first


def restart_recorded(folder: Path, name: str, meanwhile: Callable[[], None]) -> Process:
    """Kill a recorded process that stays, and start it again as it was; it is down while `meanwhile` runs."""
    pid = recorded(folder)[name]
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    os.kill(pid, signal.SIGKILL)
    try:
        meanwhile()
    finally:
        process = Process.start(folder, name, argv, stays=True)
    return process


def dies_with_us() -> list[str]:
    """The start of an argv that has the kernel kill the program when the thread that started it ends."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def executable(name: str) -> Path:
    """A program of this Python environment, else of the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is missing here; `make venv` installs it")
    return Path(found)


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Free ports of an address of ours, below the range for outgoing connections, which could take them again at once."""
    found: list[int] = []
    # Not by the process's generator: tests seed it, and two that start servers at once would draw the same ports.
    for port in random.SystemRandom().sample(range(15000, 32000), 1000):
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def answers(url: str, *, ca: Path | None = None) -> bool:
    """Whether a GET of `url` is answered with success, at once. Without `ca`, any certificate will do."""
    context = ssl.create_default_context(cafile=ca) if url.startswith("https") else None
    if context and ca is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        urllib.request.urlopen(url, timeout=2, context=context).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def _end(pid: int, grace: float) -> None:
    start = _start_time(pid)
    for signum, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
        while _start_time(pid) == start:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        else:
            return
    raise RuntimeError(f"process {pid} does not end")


def _start_time(pid: int) -> str | None:
    """Clock ticks from boot to the start of a process that has not ended; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
