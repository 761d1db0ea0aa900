#!/usr/bin/env bash
# Set up and run all checks: lint, format, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ruff check .
ruff format --check .
mypy
# Files go to the workers in the order of tests/conftest.py, and not by their numbers of tests.
pytest -q -n auto --dist loadfile --no-loadscope-reorder "$@"
