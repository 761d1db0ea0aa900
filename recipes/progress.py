"""How much of a long piece of work is done, and how long the rest will take: a line every SECONDS seconds.

A line and not a bar, so that a log file of a job without a terminal has it too.
"""

import time
from collections.abc import Callable

SECONDS = 10.0


class Progress:
    """Says how much of a known amount of work is done and the time left, at the rate so far.

    Args:
        name: of the work, which begins each line.
        total: amount of work, in any unit, above 0.
        say: takes a line; None prints it.
    """

    def __init__(self, name: str, total: float, say: Callable[[str], None] | None = None) -> None:
        self.name, self.total, self.done, self._say = name, total, 0.0, say
        self.began = self.said = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        """Count work that has been done since the last call."""
        self.done += amount
        if not self._is_due() or not self.done:
            return
        seconds = time.monotonic() - self.began
        left = seconds * max(0.0, self.total - self.done) / self.done
        self._write(f"{min(1.0, self.done / self.total):.0%}, about {duration(left)} left")

    def wait(self, what: str) -> None:
        """Say that work whose amount is not known goes on, and for how long it has."""
        if self._is_due():
            self._write(f"{what}, {duration(time.monotonic() - self.began)} so far")

    def _is_due(self) -> bool:
        return time.monotonic() - self.said >= SECONDS

    def _write(self, text: str) -> None:
        self.said = time.monotonic()
        line = f"{self.name}: {text}"
        print(line, flush=True) if self._say is None else self._say(line)


def duration(seconds: float) -> str:
    """Seconds as 3m05s or 2h07m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
