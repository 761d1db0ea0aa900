"""Refuse bad input in one way: a message that names the key or file, the value and the remedy, without a traceback."""

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NoReturn

STOPPING = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP
"""Signals at which a run saves and ends."""


class ConfigError(Exception):
    """Input that cannot be run. The message names the key or file, the value, and what to do about it."""

    status = 2
    """Exit status of a program that ends with this error."""

    alone = False
    """Whether one rank has it and the others do not, so that it cannot leave the message to rank 0."""


class TooLargeError(ConfigError):
    """A job that does not fit into GPU memory. A program that starts jobs tells it from bad input by its status."""

    status = 3


class LostProcessError(ConfigError):
    """A process that the run needs has ended: no fault of the input."""

    status = 1


def lost_data_process(what: str) -> LostProcessError:
    """The error to report where a process that reads the data was killed, by `what`."""
    return LostProcessError(
        f"{what} ended a process that reads the data, perhaps for lack of memory: run the same command again, it "
        "resumes; if it happens again, lower training.dataloader.num_workers"
    )


def refuse(key: str, value: Any, problem: str, remedy: str) -> ConfigError:
    """The error for a key's value, in the form that all of them have."""
    return ConfigError(f"{key} = {json.dumps(value)}: {problem}; {remedy}")


@contextlib.contextmanager
def writing(name: str, folder: str) -> Iterator[None]:
    """Report a full disk, or another error of the file system, as one message.

    Args:
        name: what is written, of the run in `folder`.
        folder: job.dump_folder.

    Raises:
        ConfigError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        problem = f"{name} cannot be written ({error.strerror or first_line(error)})"
        remedy = "free space or make it writable, then run the same command again: it resumes"
        raise refuse("job.dump_folder", folder, problem, remedy) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None, speaks: bool = True
) -> None:
    """A program's `sys.excepthook`: Ctrl-C is one line and exit status 130, without a traceback.

    A program whose output nobody reads any more, as with `| head`, ends without a word, with the status of SIGPIPE.

    Args:
        kind, error, trace: of an exception that nothing caught. The message of a KeyboardInterrupt says what was done
            so far and how to go on.
        speaks: whether this process writes the line, of all that get the Ctrl-C.
    """
    if issubclass(kind, BrokenPipeError) and _output_has_no_reader():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        raise SystemExit(128 + signal.SIGPIPE)
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    if speaks:
        print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr, flush=True)
    raise SystemExit(128 + signal.SIGINT)


def _output_has_no_reader() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors alone
    return bool(poll.poll(0))


def exit_with(error: ConfigError) -> NoReturn:
    """Print the error once, whatever the number of ranks, and exit with the error's status.

    Rank 0 prints and exits; torchrun then ends the other ranks. Any other rank waits before it prints and exits: if it
    exited first, torchrun would end rank 0 before that has printed. If nothing ends the waiting rank, only its machine
    has the error, and it prints. An error that one rank has alone is printed at once.
    """
    if int(os.environ.get("RANK", "0")) != 0 and not error.alone:
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)  # the trainer's handlers would not end the process
        time.sleep(15)
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.status)


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's `main` and exit with the status that it returns, or with a ConfigError's message and status."""
    try:
        sys.exit(main())
    except ConfigError as error:
        exit_with(error)
