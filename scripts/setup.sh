# Make .venv in the checkout with everything that training and tests need. Sourced by the other scripts; safe to run again.
#
# PYTHON names another interpreter (3.11 or later), TORCH another torch, such as TORCH="torch==2.11.0". Without TORCH the
# one that was installed last stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# With it Python keeps no module compiled: each start would compile thousands anew, and take three times as long.
unset PYTHONDONTWRITEBYTECODE

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $("$python" --version) is too old: set PYTHON to a Python of 3.11 or later" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv

# What was installed: the checksum of pyproject.toml, and which torch. Only when one of them changes there is work to do.
installed=.venv/installed
sum=$(cksum <pyproject.toml | cut -d' ' -f1)
read -r sum_before torch_before < <(cat "$installed" 2>/dev/null) || true
torch=${TORCH:-${torch_before:-torch==2.13.0}}

# uv installs in a third of pip's time, but reads nothing of pip's configuration: it is told where pip would look.
install_by_uv() {
    .venv/bin/python -m pip install --disable-pip-version-check --no-compile --quiet uv || return
    # The address of an index may hold a password.
    (umask 077 && .venv/bin/python -m pip config list | .venv/bin/python -c '
import ast, sys
for key, value in (line.strip().split("=", 1) for line in sys.stdin):
    option = key.rpartition(".")[2]
    if option in ("index-url", "extra-index-url", "find-links", "constraint"):
        for each in ast.literal_eval(value).split():
            print(f"--{option} {each}")
' >.venv/where.txt) || return
    # Of several indexes pip takes the newest release that any of them has.
    .venv/bin/python -m uv pip install --python .venv/bin/python --index-strategy unsafe-best-match \
        --requirements .venv/where.txt "$@"
}

if [ "${sum_before:-} ${torch_before:-}" != "$sum $torch" ]; then
    echo "installing into .venv: $torch, torchtitan, torchao, datasets and what tests need (minutes the first time)"
    while sleep 15 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do echo "  $((SECONDS / 60))m$((SECONDS % 60))s so far"; done &
    if ! install_by_uv "$torch" --editable ".[dev]"; then
        echo "uv did not install it: pip does"
        # Not --quiet: pip shows each download and, on a terminal, how long it will take; it unpacks without a word.
        # Python compiles a module when it first imports it; pip would compile all that there are, for a minute.
        .venv/bin/python -m pip install --disable-pip-version-check --no-compile "$torch" --editable ".[dev]"
    fi
    kill $! 2>/dev/null || true
    echo "$sum $torch" >"$installed"
    # All of the trainer is imported, and so compiled, once: else the first programs would each compile it.
    .venv/bin/python -c 'import torch, train; print(f"installed: torch {torch.__version__}, on", "a GPU" if torch.cuda.is_available() else "the CPU")'
    echo "that took $((SECONDS / 60))m$((SECONDS % 60))s"
fi
export PATH="$PWD/.venv/bin:$PATH"
