"""A run that hangs ends by itself, and leaves the stacks of its threads.

A collective that a rank does not reach has a timeout (`comm.train_timeout_seconds`), and a data process that is killed
is reported. Everything else that does not return has none: a kernel that does not end, a file system that does not
answer, a deadlock between threads. So a thread of each rank watches the steps. After `training.hang_timeout_seconds`
without the end of a step it writes where every thread stands, and ends the process with status 1. torchrun then ends
the other ranks and, with --max-restarts, starts all of them again from the newest checkpoint.

The thread needs Python's global lock. While C code holds the lock for that long, `faulthandler`, which does not need
it, writes the stacks, but the process stays. SIGUSR2 writes the stacks at any time and ends nothing.
"""

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Iterator

STDERR = 2
LOOKS = 10  # how often the thread looks in the time that ends a run


class Watchdog:
    """Ends the process when a watched step does not end in time.

    Args:
        seconds: that a step may take; 0: it may take any time.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._step = 0  # the watched one; 0: none
        self._idle = 0.0  # seconds since the last sign of life
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        faulthandler.register(signal.SIGUSR2, file=STDERR, all_threads=True)
        if seconds:
            self._thread.start()

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Watch a step, with its validations and its checkpoint, while the context is open."""
        self._idle, self._step = 0.0, step
        try:
            yield
        finally:
            self._step = 0

    def beat(self) -> None:
        """A part of the step has ended, such as one of its validations: the time begins anew."""
        self._idle = 0.0

    def close(self) -> None:
        """Stop watching."""
        faulthandler.unregister(signal.SIGUSR2)
        if self._seconds:
            self._closed.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        look = max(0.01, self._seconds / LOOKS)
        while True:
            faulthandler.dump_traceback_later(self._seconds + look, file=STDERR)  # unless this line is reached again
            if self._closed.wait(look):
                return
            # A look counts as planned, however long it took: a process that was stopped by a signal has not hung.
            self._idle += look
            if self._step and self._idle >= self._seconds:
                self._end()

    def _end(self) -> None:
        line = (
            f"error: step {self._step} has not ended after training.hang_timeout_seconds = {self._seconds:g} on rank "
            f"{os.environ.get('RANK', '0')}: the run hangs and ends with status 1; the same command resumes from the "
            "newest checkpoint. If a step may take so long, raise the key. Where each thread stands:\n"
        )
        os.write(STDERR, line.encode())
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        os._exit(1)
