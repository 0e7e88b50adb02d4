"""The fuzzer of checkpoints and configs: ``python -m tests.fuzz --cases 10000``."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.run import SEED, Fuzzer


def main() -> int:
    """Run, print what happened, and fail if anything did that must not."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--show", action="store_true", help="print every case")
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vllm-sparse-fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder), options.seed)
        for number in range(options.first, options.first + options.cases):
            case = fuzzer.case(number)
            if options.show:
                print(f"{number} {case}")
        result = fuzzer.result
    seconds = time.perf_counter() - start
    print(f"{result.cases} cases (seed {options.seed}) in {seconds:.0f} s")
    print(
        f"{result.refused} refused with a message, {result.loaded} loaded ({result.same} with the numbers "
        f"they had, {result.loaded - result.same} as a second reader has them), {result.converted} converted "
        "and read back"
    )
    print(f"{result.crashes} crashes, {result.hangs} hangs, {result.wrong} wrong loads")
    for problem in result.problems[:50]:
        print(problem)
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
