"""``python -m converters.train``: train, compress, eval."""

import sys

from converters.train.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
