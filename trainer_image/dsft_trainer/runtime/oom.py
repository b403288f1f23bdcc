"""The kernel's count of processes that it killed for want of memory: the only trace of a rank that went that way."""

from pathlib import Path

# Of a container: cgroup v2 shows its own group at the root, v1 one folder below.
_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))


def oom_kills() -> int:
    """Killed in this container so far; 0 where the kernel does not say."""
    for path in _COUNTERS:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    return 0
