#!/usr/bin/env bash
# Make the virtual environment of a stack, or bring it up to date.
#
#     requirements/setup_venv.sh STACK DIRECTORY
#
# A stack is a set of pinned versions: default, newest, classic or living
# (requirements/stacks).
# Environment variables: PYTHON, the interpreter to start from; CXX, the compiler;
# MAX_JOBS, how many compilers may run at once.
#
# Each step leaves a stamp in the environment: a checksum of all that the step depends
# on. A step with the right stamp is skipped, so a finished environment costs nothing,
# and an interrupted set-up continues with the step that was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stack=$1
venv=$2
python=$venv/bin/python
log=$venv.log
constraints=requirements/stacks/$stack.txt
# torch 2.14 and newer needs C++20, which mmcv's setup.py does not ask for.
standard=c++17
case $stack in
    default | classic) mmcv=mmcv hosts=(pretrain seg det) ;;
    newest) mmcv=mmcv hosts=(pretrain seg det) standard=c++20 ;;
    living) mmcv=onedl-mmcv hosts=(onedl) standard=c++20 ;;
    *)
        echo "STACK=$stack is unknown; choose from default, newest, classic, living." >&2
        exit 1
        ;;
esac
wheel_cache=${XDG_CACHE_HOME:-$HOME/.cache}/mmrep/wheels
steps=(venv tools torch packages mmcv project)
requirements=()
for name in runtime "${hosts[@]}" onnx tests docs; do
    requirements+=("requirements/$name.txt")
done

describe() {
    case $1 in
        venv) echo "Making $venv for the $stack stack (seconds)" ;;
        tools) echo 'Installing pip and build tools (10 seconds)' ;;
        torch) echo 'Installing torch and torchvision (1-3 minutes, 5 GB)' ;;
        packages) echo 'Installing the hosts and packages for tests and docs (1 minute)' ;;
        mmcv) echo "Installing $mmcv (compiling it: 3 minutes on 2 cores with gcc, once)" ;;
        project) echo 'Installing mmrep, and checking the environment (20 seconds)' ;;
    esac
}

# All that the result of step $1 depends on, its own code included.
inputs() {
    declare -f "install_$1"
    case $1 in
        venv) pwd -P ;; # an environment cannot be moved
        tools) pins pip setuptools wheel ninja psutil ;;
        torch) pins torch torchvision numpy ;;
        packages) all_constraints && cat "${requirements[@]}" ;;
        mmcv) pins "$mmcv" torch ;;
        project) cat setup.py pyproject.toml mmrep/version.py requirements/*.txt ;;
    esac
}

install_venv() {
    rm -rf "$venv"
    "$base_python" -m venv "$venv"
}

install_tools() {
    pip_install pip setuptools wheel ninja psutil
}

install_torch() {
    pip_install torch torchvision
}

install_packages() {
    pip_install "${requirements[@]/#/--requirement=}"
    # A library that the system lacks (libGL, for one) should show here, not look like
    # a broken mmcv below.
    "$python" -c 'import cv2, mmengine, torchvision'
}

# mmcv is on PyPI as source only. A compiled mmcv fits one version of torch and Python,
# which pip's own cache ignores; hence a separate cache, so that the next checkout need
# not compile.
install_mmcv() {
    local key
    key=$(pins "$mmcv")-torch-$("$python" -c 'import sys, sysconfig, torch
tag, platform = sys.implementation.cache_tag, sysconfig.get_platform()
print(torch.__version__, tag, platform, sep="-")')
    if ! try_mmcv "$wheel_cache/$key"; then
        mkdir -p "$wheel_cache/$key"
        build=$(mktemp -d "$wheel_cache/.build-XXXXXX") # global: the trap runs last
        trap 'rm -rf "$build"' EXIT
        # CFLAGS replace Python's own, which ask for debugging symbols.
        export CFLAGS='-DNDEBUG -fwrapv -g0 -O1'
        export REAL_CXX=$CXX CXX=c++-for-mmcv CXX_STANDARD=$standard HEADER_DIR=
        if can_precompile; then
            HEADER_DIR=$build/header
            mkdir "$HEADER_DIR"
        fi
        # With no GPU in sight mmcv compiles its CPU ops only, which needs no nvcc. The
        # path is for ninja, and for the compiler above.
        MMCV_WITH_OPS=1 CUDA_VISIBLE_DEVICES='' FORCE_CUDA=0 \
            MAX_JOBS=${MAX_JOBS:-$(jobs_that_fit)} \
            PATH=$PWD/$venv/bin:$PWD/requirements:$PATH \
            "$python" -m pip wheel --verbose --no-cache-dir --no-deps \
            --no-build-isolation --wheel-dir "$build" "$(pins "$mmcv")"
        mv -f "$build"/*.whl "$wheel_cache/$key/"
        try_mmcv "$wheel_cache/$key"
    fi
}

install_project() {
    pip_install --no-deps --no-build-isolation --editable .
    "$python" -m pip check
    "$python" -c 'import mmpretrain.models, mmseg.models'
    [[ $stack == living ]] || "$python" -c 'import mmdet.models'
}

# Install the wheel in directory $1, if there is one, and see whether its ops load.
try_mmcv() {
    local wheels=("$1"/*.whl)
    [[ -f ${wheels[0]} ]] \
        && "$python" -m pip uninstall --yes "$mmcv" \
        && pip_install --no-deps "${wheels[0]}" \
        && "$python" -c 'import mmcv.ops'
}

# Compilers other than gcc use precompiled headers differently.
can_precompile() {
    command -v flock >/dev/null && $REAL_CXX -v 2>&1 | grep -q '^gcc version'
}

# One compiler per core, and 2 GiB for each.
jobs_that_fit() {
    "$python" -c 'import os, psutil
print(max(1, min(os.cpu_count(), psutil.virtual_memory().available >> 31)))'
}

# Remove the records of packages that a killed pip was installing; pip itself would take
# them for complete. INSTALLER is the file that it writes last.
drop_half_installed() {
    local info
    for info in "$venv"/lib/python*/site-packages/*.dist-info; do
        [[ -f $info/INSTALLER ]] || rm -rf "$info"
    done
}

# The constraints go to every call, so that no step replaces what another installed.
pip_install() {
    "$python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" "$@"
}

# The stack's constraints, and those that they refer to.
all_constraints() {
    local file=$constraints
    while [[ $file ]]; do
        cat "$file"
        file=$(sed -n 's|^-c |requirements/stacks/|p' "$file")
    done
}

# The pins of the named packages.
pins() {
    local names
    names=$(IFS='|' && echo "$*")
    all_constraints | grep -E "^($names)=="
}

# Set base_python. Candidates are run, not merely looked up: one on PATH may be a shim
# for a version that is not installed.
find_python() {
    local candidates=(python3.11 python3.12 python3.10 python3 python)
    local newest=12 versions='3.10, 3.11 or 3.12' candidate
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    if [[ $stack == classic ]]; then
        newest=11 versions='3.10 or 3.11 (torch 2.1 has no wheels for 3.12)'
    fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c "import ensurepip, sys
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest))" >/dev/null 2>&1; then
            base_python=$candidate
            return
        fi
    done
    die "The $stack stack needs Python $versions with its venv module, and none" \
        "of ${candidates[*]} is one: install one (on Debian: python3-venv python3-dev)" \
        "or name it with PYTHON=..."
}

# Set CXX. Checked before the long downloads, although only mmcv needs it.
find_compiler() {
    local candidates=(c++ g++ clang++) candidate headers
    [[ -z ${CXX:-} ]] || candidates=("$CXX")
    headers=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [[ -f $headers/Python.h ]] || die "Compiling mmcv needs the header files of $1:" \
        "install them (on Debian: python3-dev) or name another Python with PYTHON=..."
    for candidate in "${candidates[@]}"; do
        if $candidate "-std=$standard" -fsyntax-only -x c++ - <<<'#include <vector>' \
            2>/dev/null; then
            export CXX=$candidate
            return
        fi
    done
    die "Compiling $mmcv needs a ${standard/c/C} compiler, and none of" \
        "${candidates[*]} is one: install one (on Debian: g++) or name it with CXX=..."
}

die() {
    echo "$@" >&2
    exit 1
}

is_done() {
    [[ -f $venv/.stamps/$1 && $(<"$venv/.stamps/$1") == "$(inputs "$1" | cksum)" ]]
}

all_done() {
    local step
    for step in "${steps[@]}"; do
        is_done "$step" || return 1
    done
}

run() {
    local start=$SECONDS
    describe "$1"
    running=$1
    if [[ -t 1 ]]; then
        watch_compiling &
        watcher=$!
    fi
    # In a subshell of its own and not in an `if`, where bash would ignore `set -e`.
    ("install_$1") >"$log" 2>&1
    running=
    stop_watching
    mkdir -p "$venv/.stamps"
    inputs "$1" | cksum >"$venv/.stamps/$1"
    echo "  took $(duration $((SECONDS - start)))"
}

# Show how many files ninja has compiled, from the log.
watch_compiling() {
    local count
    trap 'printf "\r\033[K"; exit' TERM
    while sleep 1; do
        count=$(sed -n 's|^ *\[\([0-9]*\)/\([0-9]*\)\] .*|\1 of \2 files|p' "$log" \
            2>/dev/null | tail -n 1)
        [[ ! $count ]] || printf '\r\033[K  %s' "$count"
    done
}

stop_watching() {
    if [[ $watcher ]]; then
        # It clears its line when it ends.
        kill "$watcher"
        wait "$watcher" || true
        watcher=
    fi
}

duration() {
    if (($1 < 60)); then echo "$1 s"; else echo "$(($1 / 60)) min $(($1 % 60)) s"; fi
}

explain_exit() {
    local status=$?
    stop_watching
    if ((status > 128)); then
        echo 'Interrupted. The same command goes on from here.' >&2
    elif ((status)) && [[ $running ]]; then
        # The errors first: after a compiler's, pip prints screens of traceback.
        { grep -i 'error: ' "$log" | head -n 5 || true; } >&2
        echo '...' >&2
        tail -n 20 "$log" >&2
        echo "The step '$running' failed; above are the errors in $log and its end." \
            'Once the cause is gone, the same command goes on from here.' >&2
    fi
}

# The folder may be deleted below, which `make VENV=..` by mistake must not do.
[[ $venv == .venv* ]] || die "VENV=$venv is refused: the name has to begin with .venv."

# The interpreter may have gone since, with an upgrade of the system.
"$python" -c '' 2>/dev/null || rm -f "$venv/.stamps/venv"

if all_done; then exit 0; fi

running= watcher=
trap explain_exit EXIT
trap 'exit 130' INT

# Two set-ups of one environment take turns. pip inherits the lock, so a pip that outlives
# its set-up is waited for as well.
if command -v flock >/dev/null; then
    exec 9<"$constraints"
    flock --nonblock 9 || {
        echo "Another set-up of $venv is at work; waiting for it."
        flock 9
    }
fi

base_python=$python
is_done venv || find_python
is_done mmcv || find_compiler "$base_python"
drop_half_installed

for step in "${steps[@]}"; do
    is_done "$step" || run "$step"
done
rm -f "$log"
echo "$venv is ready after $(duration $SECONDS)."
