"""`python -m dsft_operator`: run the operator."""

import asyncio
import os
import sys

from dsft_operator.app import run
from dsft_operator.config import ConfigError, load_config
from dsft_operator.runtime import logs

# A resource may nest as deep as the API server's JSON, 10,000 levels, and each list has those of all users: none of them may end
# the operator. What is nested so deep is refused where it is judged.
NESTING = 50_000


def main() -> int:
    """Run until a signal; exit code 2 for a configuration that cannot be used."""
    sys.setrecursionlimit(NESTING)
    logs.set_up(os.environ.get("DSFT_LOG_LEVEL", "info"))
    try:
        config = load_config()
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    asyncio.run(run(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
