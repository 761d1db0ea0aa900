# Make .venv in the checkout with everything that training and tests need. Sourced by the other scripts; safe to run again.
#
# PYTHON names another interpreter (3.11 or later), TORCH another torch, such as TORCH="torch==2.11.0". Without TORCH the
# one that was installed last stays. Packages are from where pip would take them. PyPI's torch for Linux brings CUDA;
# `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/setup.sh` installs the smaller one for a CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# With it Python keeps no module compiled: each start would compile thousands anew.
unset PYTHONDONTWRITEBYTECODE

version() { "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null; }
refuse() { echo "error: $1" >&2; exit 2; }

python=${PYTHON:-python3}
if .venv/bin/python -c "" 2>/dev/null; then
    has=$(version .venv/bin/python)
    [ "$(version "${PYTHON:-.venv/bin/python}")" = "$has" ] ||
        refuse "PYTHON=$PYTHON is not the Python of .venv, $has: leave PYTHON out, or move .venv away"
    python=.venv/bin/python
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    found=$("$python" --version 2>/dev/null || echo "not there")
    refuse "$python is $found: set PYTHON to a Python of 3.11 or later, and move away a .venv of an older one"
}
# --clear: else a .venv whose Python is gone would stay as it is.
[ "$python" = .venv/bin/python ] || "$python" -m venv --clear .venv
.venv/bin/python -c 'import pip' 2>/dev/null || .venv/bin/python -m ensurepip ||
    refuse ".venv has no pip, as one that was not finished: move it away"

# What was installed: the checksum of pyproject.toml, and which torch. Only when one of them changes there is work to do.
# Until an installation has succeeded, "unfinished" stands in place of the checksum, beside the torch from before.
installed=.venv/installed
sum=$(cksum <pyproject.toml | cut -d' ' -f1)
read -r sum_before torch_before < <(cat "$installed" 2>/dev/null) || true
torch=${TORCH:-${torch_before:-torch==2.13.0}}

# uv installs sooner than pip, but reads nothing of pip's configuration: it is told where pip would look.
install_by_uv() {
    local where
    .venv/bin/python -m pip install --disable-pip-version-check --no-compile --quiet uv || return
    where=$(.venv/bin/python -m pip config list | .venv/bin/python -c '
import ast, sys
given = dict(line.strip().split("=", 1) for line in sys.stdin)
for option in ("index-url", "extra-index-url", "find-links", "constraint"):
    found = [given[key] for section in (":env:", "install", "global") if (key := f"{section}.{option}") in given]
    for each in ast.literal_eval(found[0]).split() if found else ():
        print(f"--{option} {each}")
sys.exit(any(key.endswith(".no-index") for key in given))  # pip knows when it holds
') || return
    # Of several indexes pip takes the newest release that any of them has. Their addresses may hold a password, which
    # stays out of the list of processes.
    .venv/bin/python -m uv pip install --python .venv/bin/python --index-strategy unsafe-best-match \
        --requirements - "$@" <<<"$where"
}

if [ "${sum_before:-} ${torch_before:-}" != "$sum $torch" ]; then
    echo "installing into .venv: $torch, torchtitan, torchao, datasets and what tests need (minutes the first time)"
    echo "unfinished ${torch_before:-}" >"$installed"
    while sleep 15 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do echo "  $((SECONDS / 60))m$((SECONDS % 60))s so far"; done &
    trap "kill $!" EXIT # after a failure too: the loop would keep the output open for who reads it to its end
    if ! install_by_uv "$torch" --editable ".[dev]"; then
        echo "uv did not install it: pip does"
        # Not --quiet: pip shows each download and, on a terminal, how long it will take; it unpacks without a word.
        # Python compiles a module when it first imports it; pip would compile all that there are, for a minute.
        .venv/bin/python -m pip install --disable-pip-version-check --no-compile "$torch" --editable ".[dev]"
    fi
    kill $! || true
    trap - EXIT
    echo "$sum $torch" >"$installed"
    # All of the trainer is imported, and so compiled, once: else the first programs would each compile it.
    .venv/bin/python -c 'import torch, train; print(f"installed: torch {torch.__version__}, on", "a GPU" if torch.cuda.is_available() else "the CPU")'
    echo "that took $((SECONDS / 60))m$((SECONDS % 60))s"
fi
export PATH="$PWD/.venv/bin:$PATH"
