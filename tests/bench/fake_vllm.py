"""Stands in for the ``vllm`` program: a scripted server, on demand with children that hang."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.loopback import Script, serve

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--served-model-name")
    parser.add_argument("--max-model-len", "--max_model_len", type=int)
    parser.add_argument("--dtype", default="bfloat16", help="float32 answers four times as fast")
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--hang", action="store_true")
    parser.add_argument("--stubborn", action="store_true", help="have children that ignore SIGTERM")
    parser.add_argument("--gap-ms", type=float, default=1.0)
    arguments = parser.parse_args()
    print("(APIServer pid=1) INFO 01-01 00:00:00 [loader.py:1] Loading weights", flush=True)
    if arguments.fail:
        print("(EngineCore pid=2) ERROR 01-01 00:00:00 [core.py:2] ValueError: K is 7, not a multiple of 4")
        print("(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.")
        sys.exit(1)
    if arguments.stubborn:
        subprocess.Popen([sys.executable, "-S", "-c", STUBBORN])
        subprocess.Popen([sys.executable, "-S", "-c", STUBBORN], start_new_session=True)
    if arguments.hang:
        time.sleep(600)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # The scripted server ends with its standard input; a server has none, so give it one that stays open.
    reader, _ = os.pipe()
    os.dup2(reader, 0)
    slowdown = float((Path(arguments.model) / "slowdown").read_text())
    if arguments.dtype == "float32":
        slowdown /= 4
    script = Script(
        5 * slowdown,
        arguments.gap_ms * slowdown,
        logprob_shift=0.1 * (slowdown - 1),
        max_model_len=arguments.max_model_len,
    )
    serve(script, arguments.port, arguments.served_model_name)


main()
