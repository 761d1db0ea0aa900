"""The programs: each is run as `python -m scripts.NAME`, and its module's docstring says what it does."""

import sys

from configs.errors import show_error

# The first module of every program: Ctrl-C is one line from here on, also while the others are imported.
sys.excepthook = show_error
