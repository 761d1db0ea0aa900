"""One way to refuse bad input: name the key or file, the value and the remedy, once, without a traceback."""

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
    """A job that does not fit into GPU memory. A program that starts jobs can tell it by its status from bad input."""

    status = 3


def refuse(key: str, value: Any, problem: str, remedy: str) -> ConfigError:
    """The error for a key's value, in the form that all of them have."""
    return ConfigError(f"{key} = {json.dumps(value)}: {problem}; {remedy}")


def exit_with(error: ConfigError) -> None:
    """Print the error once whatever the number of ranks and exit with the error's status.

    Rank 0 speaks and exits, which makes torchrun end the others. They wait for that, so that nobody ends rank 0
    before it has spoken, and speak themselves only if it never comes: then the fault is one that only their machine
    has.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)  # the trainer's handlers would only take note of torchrun's SIGTERM
        time.sleep(15)
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.status)
