"""The trainer image's entrypoint."""

import sys

from dsft_trainer.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
