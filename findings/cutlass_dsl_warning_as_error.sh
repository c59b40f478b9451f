#!/usr/bin/env bash
# Where warnings are errors, as in many projects' tests, CUTLASS DSL refuses a static loop of 64 rounds or more, and says that its
# bound is not known. 63 rounds pass.
#
# Versions: nvidia-cutlass-dsl 4.8.0, pytest 9.0.2, Python 3.11. No GPU is needed.
# Seen: without -W error, "2 passed, 1 warning": the loop of 64 "may be very slow to compile". With it, 63 passes, and 64 fails with
#       DSLUserCodeError, "error[ARG_NON_CONSTANT]: `range_constexpr()` requires all arguments to be Python integers known at
#       code-read time". The warning is raised inside of the check for integers, whose `except` catches all.
# Why it matters: attention kernels of vLLM and others have such loops, and head_dim decides whether one has 64 rounds. The message
#       sends the reader to the kernel's arguments. Tests that compile such a kernel have to let warnings be warnings.
# Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check nvidia-cutlass-dsl==4.8.0 pytest==9.0.2
cat > test_loop.py <<'PYTHON'
import cutlass
import cutlass.cute as cute
import pytest


@cute.jit
def add_up(n: cutlass.Constexpr):
    total = 0
    for i in cutlass.range_constexpr(n):
        total += i
    cute.printf("%d\n", total)


@pytest.mark.parametrize("n", [63, 64])
def test_add_up(n):
    add_up(n)
PYTHON
run() { venv/bin/python -m pytest -q -p no:cacheprovider --color=no "$@" test_loop.py 2>&1 || true; }
plain=$(run) strict=$(run -W error)
tail -n 1 <<< "$plain"
grep -E "ARG_NON_CONSTANT|^FAILED|passed" <<< "$strict"
grep -q "^2 passed, 1 warning" <<< "$plain"
grep -q "^FAILED test_loop.py::test_add_up\[64\]" <<< "$strict"
grep -q "ARG_NON_CONSTANT" <<< "$strict"
grep -q "^1 failed, 1 passed" <<< "$strict"
