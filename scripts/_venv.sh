# Sourced by the scripts beside it. It sets ROOT, the repository, and VENV, its virtual environment; `ensure_venv` makes
# the environment, keeps it in step with pyproject.toml and constraints.txt, and does nothing when neither has changed.
# PYTHON=python3.12 scripts/test makes it with another interpreter than the first suitable one.
#
# OLD_TRITON is a folder for PYTHONPATH with the oldest Triton that is supported, beside the pinned one; only on Linux,
# as Triton itself.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMP=$VENV/crossdock-installed
OLD_TRITON_VERSION=3.6.0
OLD_TRITON=$VENV/triton-$OLD_TRITON_VERSION

say() { printf 'crossdock: %s\n' "$*" >&2; }

die() {
    say "$@"
    exit 1
}

# What the environment was last installed from. The path is in it because an editable install points back to the tree.
wanted_stamp() {
    printf '%s\n' "$ROOT" "triton==$OLD_TRITON_VERSION"
    cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt"
}

# Prints the interpreter to build with. `python3` comes first: it is the one that the machine's owner chose.
find_python() {
    local name without_venv="" names=(python3 python3.14 python3.13 python3.12 python3.11 python3.10)
    if [[ -n ${PYTHON:-} ]]; then
        names=("$PYTHON")
    fi
    for name in "${names[@]}"; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
        if "$name" -c 'import venv, ensurepip' 2>/dev/null; then
            command -v "$name"
            return
        fi
        without_venv+=" $name"
    done
    if [[ -n $without_venv ]]; then
        die "found$without_venv, but without the modules venv and ensurepip, which make a virtual environment;" \
            "install them (on Debian and Ubuntu: apt install python3-venv) and call this again"
    fi
    if [[ -n ${PYTHON:-} ]]; then
        die "PYTHON=$PYTHON is not a Python 3.10 or newer that runs; unset it or name another"
    fi
    die "found no Python 3.10 or newer; install one, or name it: PYTHON=/path/to/python3 $0"
}

make_venv() {
    local python
    python=$(find_python)
    say "making .venv with $python ($("$python" --version))"
    if ! "$python" -m venv "$VENV"; then
        rm -rf "$VENV"
        die "could not make .venv; what $python said is above (PYTHON=... $0 takes another one)"
    fi
}

# Without what it depends on: that is the environment's, whatever this version of Triton asks for.
install_old_triton() {
    rm -rf "$VENV"/triton-*
    [[ $(uname -s) == Linux ]] || return 0
    "$VENV/bin/python" -m pip install --no-deps --target "$OLD_TRITON" "triton==$OLD_TRITON_VERSION" >&2
}

ensure_venv() {
    if [[ -f $STAMP && $(wanted_stamp) == "$(cat "$STAMP")" ]]; then
        return
    fi
    # An environment that we installed elsewhere has been copied or moved: its programs start the old place's Python.
    if [[ -f $STAMP && $(head -n 1 "$STAMP") != "$ROOT" ]]; then
        say "this tree was copied or moved; making its .venv anew"
        rm -rf "$VENV"
    fi
    if [[ ! -e $VENV ]]; then
        make_venv
    elif ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        die ".venv has no working pip; remove it (rm -rf $VENV) and call this again, which makes a new one"
    fi
    rm -f "$STAMP"
    say "installing torch, the tools and crossdock itself into .venv" \
        "(only when pyproject.toml has changed; the first time it downloads torch, up to 3 GB, which takes minutes)"
    "$VENV/bin/python" -m pip install --constraint "$ROOT/scripts/constraints.txt" \
        --editable "$ROOT[all,test,check,docs]" >&2 && install_old_triton ||
        die "the installation failed; what pip said is above. Without the network it needs a package cache;" \
            "if a package has no release for this Python, name another: rm -rf $VENV; PYTHON=python3.12 $0"
    wanted_stamp >"$STAMP"
    say "installed"
}
