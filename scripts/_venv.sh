# Sourced by the other scripts: prepares the project's virtual environment.
#   venv_prepare EXTRAS   sets VENV; installs the project with these extras unless that was done already
# PYTHON names the interpreter (3.11 or newer), DFMPC_VENV the environment's folder (default: .venv in the project).

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

venv_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v -- "$name"
            return
        fi
        if [ "$name" = "${PYTHON:-}" ]; then
            echo "error: PYTHON=$PYTHON is no Python 3.11 or newer" >&2
            return 1
        fi
    done
    echo "error: no Python 3.11 or newer was found; install one or set PYTHON to it" >&2
    return 1
}

# The environment is as it should be when this is what its stamp says.
venv_stamp() {
    "$1" - "$ROOT" "$2" <<'PYTHON_CODE'
import hashlib, pathlib, sys
root, extras = sys.argv[1:]
text = (pathlib.Path(root) / "pyproject.toml").read_bytes() + repr((root, extras, sys.version)).encode()
print(hashlib.sha256(text).hexdigest())
PYTHON_CODE
}

venv_prepare() {
    local python stamp_file stamp
    VENV=${DFMPC_VENV:-$ROOT/.venv}
    case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
    if [ ! -x "$VENV/bin/python" ] || [ ! -x "$VENV/bin/pip" ]; then
        python=$(venv_python)
        echo "making the virtual environment $VENV" >&2
        "$python" -m venv "$VENV"
    fi
    stamp=$(venv_stamp "$VENV/bin/python" "$1")
    stamp_file=$VENV/.dfmpc-$(printf '%s' "$1" | tr -c 'a-z\n' '-')
    if [ "$(cat "$stamp_file" 2>/dev/null || true)" != "$stamp" ]; then
        echo "installing dfmpc[$1] into $VENV (some minutes the first time)" >&2
        venv_pip install --editable "$ROOT[$1]"
        printf '%s\n' "$stamp" >"$stamp_file"
    fi
}

venv_pip() {
    "$VENV/bin/python" -m pip --quiet --disable-pip-version-check "$@"
}
