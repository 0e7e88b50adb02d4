"""What torchrun starts in test_parallel_training: the command line, stopped after a checkpoint if asked."""

import os
import sys

from converters.train import loop
from converters.train.cli import main

stop = int(os.environ.get("STOP_AFTER_STEP", "0"))
original = loop._save


def save_then_stop(objective, directory, done, identity, seconds):
    original(objective, directory, done, identity, seconds)
    if done == stop:
        raise KeyboardInterrupt


loop._save = save_then_stop
sys.exit(main(sys.argv[1:]))
