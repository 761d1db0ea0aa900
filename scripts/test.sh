#!/usr/bin/env bash
# Set up and run all checks: lint, format, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ruff check .
ruff format --check .
mypy
pytest -q -n auto --dist loadfile "$@"
