"""``python -m bench.rivals``: write the checkpoints, then measure (see docs/performance.md)."""

import sys

from bench.rivals.cli import main

if __name__ == "__main__":
    sys.exit(main())
