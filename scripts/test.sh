#!/usr/bin/env bash
# Set up and run all checks: lint, format, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ruff check .
ruff format --check .
# Beside the tests: while pytest and its workers import, a core would be idle.
mypy &
# Files go to the workers in the order of tests/conftest.py, and not by their numbers of tests.
# A run of two processes once ended by a segmentation fault in a thread of C++, most of which are gloo's, PyTorch's
# communication between CPUs; hundreds of the same runs did not. Such a test runs once more, and the summary shows why.
failed=0
pytest -q -n auto --dist loadfile --no-loadscope-reorder --reruns 1 --only-rerun "Segmentation fault" "$@" || failed=$?
wait $! || { echo "mypy: errors, see above" >&2; exit 1; }
exit $failed
