#!/bin/bash
# Makes .venv and installs what a target needs; does nothing when that was done before for this very pyproject.toml.
#   launch/environment.sh NAME EXTRA,EXTRA...
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 extras=$2 stamp=.venv/.shipyard-$1 log=.venv/install-$1.log

find_python() {
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "environment: Python 3.11 or 3.12 is needed; install one, or set PYTHON=/path/to/python3.11" >&2
    exit 2
}

# The directory is part of the key: an environment does not survive being moved.
key="$(cksum <pyproject.toml) $extras $PWD"
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && .venv/bin/python -c 'import shipyard' 2>/dev/null; then
    exit 0
fi

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "environment: making .venv with $("$python" --version)"
    if ! "$python" -m venv --clear .venv; then
        echo "environment: this Python cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 2
    fi
fi

echo "environment: installing [$extras] (some minutes the first time; log in $log)"
start=$SECONDS
show() { # a line that rewrites itself on a terminal, and a dot for every package elsewhere
    local line
    while IFS= read -r line; do
        case $line in
            Collecting* | Downloading* | Installing*)
                if [ -t 1 ]; then printf '\r\033[K%4ds  %.90s' $((SECONDS - start)) "$line"; else printf .; fi
                ;;
        esac
    done
    if [ -t 1 ]; then printf '\r\033[K'; else echo; fi
}
if ! .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --editable ".[$extras]" 2>&1 | tee "$log" | show; then
    grep -iE '^ *error' "$log" | tail -5 >&2 || tail -20 "$log" >&2
    echo "environment: the installation failed; $log has the whole story" >&2
    exit 1
fi
echo "$key" >"$stamp"
echo "environment: ready after $((SECONDS - start)) s"
