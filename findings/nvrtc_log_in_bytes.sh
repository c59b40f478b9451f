#!/usr/bin/env bash
# cuda.bindings.nvrtc.nvrtcGetProgramLog takes `bytes` as its output buffer and writes into it. The log of a clean
# compilation is one byte long, and `b" " * 1` is the object that CPython shares for every b" ". So the usual
# `log = b" " * size` turns each space byte of the process into a zero byte.
#
# Versions: cuda-bindings 13.5.0 and 12.9.4, Python 3.9 or later. No GPU.
# Seen: "log of 1 byte", then bytes([32]) == b"\x00". With a bytearray it stays b" ".
# Why it matters: nothing fails where it happens. What failed later: torch.load of a pickled tensor ("storage has wrong byte
#       size"), and a table of characters that Hypothesis keeps on disk.
# Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
for versions in "13.5.0 nvidia-cuda-nvrtc" "12.9.4 nvidia-cuda-nvrtc-cu12"; do
	read -r bindings nvrtc <<<"$versions"
	rm -rf venv
	python3 -m venv venv
	venv/bin/python -m pip install -q --disable-pip-version-check "cuda-bindings==$bindings" "$nvrtc"
	for buffer in bytearray bytes; do
		venv/bin/python - "$bindings" "$buffer" <<'PYTHON'
import sys

from cuda.bindings import nvrtc

_, program = nvrtc.nvrtcCreateProgram(b"__global__ void f(int* p) { *p = 1; }", b"f.cu", 0, [], [])
(status,) = nvrtc.nvrtcCompileProgram(program, 0, [])
_, size = nvrtc.nvrtcGetProgramLogSize(program)
log = bytearray(size) if sys.argv[2] == "bytearray" else b" " * size
nvrtc.nvrtcGetProgramLog(program, log)
space = bytes([32])
print(f"cuda-bindings {sys.argv[1]}: log of {size} byte in a {sys.argv[2]}, then bytes([32]) == {space!r}")
assert status == 0 and size == 1
assert space[0] == (32 if sys.argv[2] == "bytearray" else 0), "the behaviour has changed"
PYTHON
	done
done
