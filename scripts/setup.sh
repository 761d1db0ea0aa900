# Make .venv in the checkout with everything that training and tests need. Sourced by the other scripts; safe to run again.
#
# PYTHON names another interpreter (3.11 or later), TORCH another torch, such as TORCH="torch==2.11.0". Without TORCH the
# one that was installed last stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $("$python" --version) is too old: set PYTHON to a Python of 3.11 or later" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv

# What was installed: the checksum of pyproject.toml, and which torch. Only when one of them changes there is work to do.
installed=.venv/installed
sum=$(cksum <pyproject.toml | cut -d' ' -f1)
read -r sum_before torch_before < <(cat "$installed" 2>/dev/null) || true
torch=${TORCH:-${torch_before:-torch==2.13.0}}
if [ "${sum_before:-} ${torch_before:-}" != "$sum $torch" ]; then
    echo "installing into .venv, 1 of 2: $torch (a few minutes the first time)"
    # Not --quiet: pip shows each download and, on a terminal, how long it will take; it unpacks without a word.
    while sleep 15 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do echo "  $((SECONDS / 60))m$((SECONDS % 60))s so far"; done &
    # Python compiles a module when it first imports it; pip would compile all that there are, for a minute.
    .venv/bin/python -m pip install --disable-pip-version-check --no-compile "$torch"
    echo "installing into .venv, 2 of 2: torchtitan, torchao, datasets and what tests need"
    .venv/bin/python -m pip install --disable-pip-version-check --no-compile --editable ".[dev]"
    kill $! 2>/dev/null || true
    echo "$sum $torch" >"$installed"
    .venv/bin/python -c 'import torch; print(f"installed: torch {torch.__version__}, on", "a GPU" if torch.cuda.is_available() else "the CPU")'
    echo "that took $((SECONDS / 60))m$((SECONDS % 60))s"
fi
export PATH="$PWD/.venv/bin:$PATH"
