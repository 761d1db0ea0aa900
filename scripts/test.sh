#!/usr/bin/env bash
# Set up and run all checks: lint, format, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ruff check .
ruff format --check .
# Beside the tests: while pytest and its workers import, a core would be idle.
mypy &
# Files go to the workers in the order of tests/conftest.py, and not by their numbers of tests.
failed=0
pytest -q -n auto --dist loadfile --no-loadscope-reorder "$@" || failed=$?
wait $! || { echo "mypy: errors, see above" >&2; exit 1; }
exit $failed
