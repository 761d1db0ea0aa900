# Make .venv in the checkout with everything that training and tests need. Sourced by the other scripts; safe to run again.
#
# PYTHON names another interpreter (3.11 or later), TORCH another torch, such as TORCH="torch==2.11.0".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $("$python" --version) is too old: set PYTHON to a Python of 3.11 or later" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv

# Only when pyproject.toml has changed since the last time.
stamp=.venv/installed-$(cksum <pyproject.toml | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    echo "installing into .venv (a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${TORCH:-torch==2.13.0}"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
