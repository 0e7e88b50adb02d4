"""The end of a torchrun launch in which a process fails: one message, one exit code, nobody left waiting.

All processes meet the same bad input at about the same time, or one alone meets its own. A process that fails
says so in torchrun's store and waits a moment: process 0 prints what it has to say; if it has nothing, the
first of the others does. A process without a failure of its own learns of it from a thread, which interrupts
it, also in the middle of a collective that would never end. All leave together, for torchrun kills those
that are left once one has gone.
"""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from torch.distributed import DistError

from converters.launch import launched_rank, launched_size, rendezvous

if TYPE_CHECKING:  # torch.distributed has them, too, but does not tell type checkers
    from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
else:
    from torch.distributed import PrefixStore, Store, TCPStore

GRACE_S = 3.0
"""How long a failure of one process waits for the same failure of process 0, or of its own."""
_POLL_S = 0.2
_FAILURES, _CODE, _SPEAKER, _MAIN, _LEAVING = "failures", "code", "speaker", "main", "leaving"
_LOST = (DistError, RuntimeError, OSError)


class Watch:
    """A thread that ends this process when another one of the launch has failed."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._store = _connect()
        if self._store is not None:
            threading.Thread(target=self._run, args=(self._store,), daemon=True).start()

    def stop(self) -> None:
        """From now on other processes do not matter: they have done their part, or this one fails too."""
        self._stopped.set()

    def _run(self, store: Store) -> None:
        try:
            while not self._stopped.wait(_POLL_S):
                if store.add(_FAILURES, 0):
                    break
            # Bad input of all is noticed by each in its turn; that is better than an interruption.
            if self._stopped.wait(GRACE_S):
                return
            _thread.interrupt_main()
            if self._stopped.wait(GRACE_S):
                return
            # In a call of a library, which no interruption reaches.
            store.add(_LEAVING, 1)
            _exit(_code(store))
        except _LOST:  # the launch is at its end
            return


_watch: Watch | None = None
_alone = False


def watch() -> None:
    """Begin to notice failures of the other processes; does nothing without torchrun."""
    global _watch
    if _watch is None and rendezvous() is not None:
        _watch = Watch()


def part() -> None:
    """This process has no others any more: failures from here on are its own."""
    global _alone
    _alone = True
    if _watch is not None:
        _watch.stop()


def end(say: Callable[[], None], code: int) -> int:
    """End this process for a failure: print it, unless another process prints its own, and leave together.

    Args:
        say: prints the message.
        code: exit code that goes with it.

    Returns:
        ``code``.
    """
    store = None if _alone else _connect()
    if store is None:
        say()
        return code
    if _watch is not None:
        _watch.stop()
    try:
        store.set(_CODE, str(code))
        if launched_rank() == 0:
            store.set(_MAIN, "")
        store.add(_FAILURES, 1)
        speaks = launched_rank() == 0 or (not _waited(store, _MAIN) and store.add(_SPEAKER, 1) == 1)
    except _LOST:
        speaks, store = True, None
    if speaks:
        say()
    if store is not None:
        _leave(store)
    return code


def ended_elsewhere() -> int | None:
    """Leave with the others if it is their failure that ends this process; the exit code, or None if not."""
    store = None if _alone else _connect()
    if store is None:
        return None
    try:
        if not store.add(_FAILURES, 0):
            return None
        if _watch is not None:
            _watch.stop()
        code = _code(store)
    except _LOST:
        return None
    _leave(store)
    return code


def _connect() -> Store | None:
    """This launch's part of torchrun's store; None without torchrun, or when it cannot be reached."""
    place = rendezvous()
    if place is None:
        return None
    try:
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=GRACE_S))
    except _LOST:
        return None
    return PrefixStore(f"vllm-sparse/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _waited(store: Store, key: str) -> bool:
    """Whether ``key`` is there now or in a moment."""
    ends = time.monotonic() + GRACE_S
    while time.monotonic() < ends:
        if store.check([key]):
            return True
        time.sleep(_POLL_S)
    return False


def _code(store: Store) -> int:
    return int(store.get(_CODE).decode())


def _leave(store: Store) -> None:
    """Wait until all processes are about to end, or for some seconds; SIGTERM then changes nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ends = time.monotonic() + 3 * GRACE_S
    try:
        store.add(_LEAVING, 1)
        while store.add(_LEAVING, 0) < launched_size() and time.monotonic() < ends:
            time.sleep(_POLL_S)
    except _LOST:
        return


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
