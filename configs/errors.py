"""One way to refuse bad input: name the key or file, the value and the remedy, once, without a traceback."""

import json
import os
import signal
import sys
import time
from typing import Any

TOO_LARGE = "does not fit into GPU memory"  # scripts.study looks for it in a run's log


class ConfigError(Exception):
    """Input that cannot be run. The message names the key or file, the value, and what to do about it."""


def refuse(key: str, value: Any, problem: str, remedy: str) -> ConfigError:
    """The error for a key's value, in the form that all of them have."""
    return ConfigError(f"{key} = {json.dumps(value)}: {problem}; {remedy}")


def exit_with(error: ConfigError) -> None:
    """Print the error once whatever the number of ranks and exit with status 2.

    Rank 0 speaks and exits, which makes torchrun end the others. They wait for that, so that nobody ends rank 0
    before it has spoken, and speak themselves only if it never comes: then the fault is one that only their machine
    has.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)  # the trainer's handlers would only take note of torchrun's SIGTERM
        time.sleep(15)
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
