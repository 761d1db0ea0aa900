"""A run that hangs ends by itself, and leaves the stacks of its threads.

A collective that a rank does not reach has a timeout (`comm.train_timeout_seconds`), and a data process that is killed
is reported. Everything else that does not return has none: a kernel that does not end, a file system that does not
answer, a deadlock between threads. So a thread of each rank watches the parts of a run: those of its start, its steps,
validations and saves. A part that takes longer than its limit ends the process with status 1, after it has written
where every thread stands. torchrun then ends the other ranks and, with --max-restarts, starts all of them again from
the newest checkpoint. There are two limits. `training.start_timeout_seconds` is for each part of the start and for
steps and validations that compile, `training.hang_timeout_seconds` for everything else.

The thread needs Python's global lock. While C code holds the lock for that long, `faulthandler`, which does not need
it, writes the stacks, but the process stays. SIGUSR2 writes the stacks at any time and ends nothing.
"""

import faulthandler
import os
import signal
import threading
from dataclasses import dataclass

STDERR = 2
LOOKS = 10  # how often the thread looks in the time that ends a run


@dataclass
class _Part:
    """A part of a run that is watched."""

    name: str
    key: str  # of its limit
    seconds: float  # the limit; 0: none
    idle: float = 0.0  # seconds since it began


class Watchdog:
    """Ends the process when a part of the run does not end in time.

    Args:
        seconds: the limit of a step, a validation or a save; 0: none.
        start_seconds: the limit of a part of the start, or of a step or validation that compiles; 0: none.
    """

    def __init__(self, seconds: float, start_seconds: float) -> None:
        self._seconds, self._start_seconds = seconds, start_seconds
        self._part: _Part | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        faulthandler.register(signal.SIGUSR2, file=STDERR, all_threads=True)
        if seconds or start_seconds:
            self._thread.start()

    def watch(self, name: str, starts: bool = False) -> None:
        """A part of the run begins, which ends the part before it.

        Args:
            name: what the message calls it, such as "step 3".
            starts: whether it belongs to the start or compiles, and so has the longer limit.
        """
        key = "training.start_timeout_seconds" if starts else "training.hang_timeout_seconds"
        self._part = _Part(name, key, self._start_seconds if starts else self._seconds)

    def close(self) -> None:
        """Stop watching."""
        faulthandler.unregister(signal.SIGUSR2)
        if self._thread.is_alive():
            self._closed.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        look = max(0.01, min(each for each in (self._seconds, self._start_seconds) if each) / LOOKS)
        while True:
            part = self._part
            if part and part.seconds:
                # Unless this line is reached again.
                faulthandler.dump_traceback_later(part.seconds + look, file=STDERR)
            else:
                faulthandler.cancel_dump_traceback_later()
            if self._closed.wait(look):
                return
            # The part that begins meanwhile is another object, so that it never gets the time of this one.
            if part and part.seconds and part is self._part:
                # A look counts as planned, however long it took: a process that a signal stopped has not hung.
                part.idle += look
                if part.idle >= part.seconds:
                    self._end(part)

    def _end(self, part: _Part) -> None:
        line = (
            f"error: {part.name} has not ended after {part.key} = {part.seconds:g} on rank "
            f"{os.environ.get('RANK', '0')}: the run hangs and ends with status 1; the same command resumes from the "
            "newest checkpoint. If it may take so long, raise the key. Where each thread stands:\n"
        )
        os.write(STDERR, line.encode())
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        os._exit(1)
