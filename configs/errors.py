"""Refuse bad input in one way: a message that names the key or file, the value and the remedy, without a traceback."""

import json
import os
import signal
import sys
import time
from typing import Any


class ConfigError(Exception):
    """Input that cannot be run. The message names the key or file, the value, and what to do about it."""

    status = 2
    """Exit status of a program that ends with this error."""


class TooLargeError(ConfigError):
    """A job that does not fit into GPU memory. A program that starts jobs tells it from bad input by its status."""

    status = 3


def refuse(key: str, value: Any, problem: str, remedy: str) -> ConfigError:
    """The error for a key's value, in the form that all of them have."""
    return ConfigError(f"{key} = {json.dumps(value)}: {problem}; {remedy}")


def exit_with(error: ConfigError) -> None:
    """Print the error once, whatever the number of ranks, and exit with the error's status.

    Rank 0 prints and exits; torchrun then ends the other ranks. Any other rank waits before it prints and exits: if it
    exited first, torchrun would end rank 0 before that has printed. If nothing ends the waiting rank, only its machine
    has the error, and it prints.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)  # the trainer's handlers would not end the process
        time.sleep(15)
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.status)
