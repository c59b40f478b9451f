#!/usr/bin/env bash
# NVRTC 13.0 and 13.1 refuse a generic lambda in device code, which NVRTC 13.2 and newer compile.
#
# Versions: nvidia-cuda-nvrtc 13.1.115 and 13.2.51, cuda-bindings 13.2.0, Python 3.11. No GPU is needed.
# Seen: for a lambda with a parameter of type `auto` inside of a __global__ function, 13.1 says "A function without execution space
#       annotations (__host__/__device__/__global__) is considered a host function, and host functions are not allowed in JIT mode".
#       13.2 compiles it. Both compile the same lambda with a parameter of a named type.
# Why it matters: PyTorch for CUDA 13.0 brings NVRTC 13.0. A kernel that is compiled at run time, and was tested with the newest
# NVRTC, does not compile for its users.
# Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check cuda-bindings==13.2.0
cat > compile.py <<'PYTHON'
import sys
from cuda.bindings import nvrtc

_, *version = nvrtc.nvrtcVersion()
assert version == [int(number) for number in sys.argv[1].split(".")[:2]], version
for parameter in ("auto", "int"):
    source = f"""extern "C" __global__ void kernel(float* x) {{
      const auto add = [&]({parameter} i) {{ x[i] += 1; }};
      add(0);
    }}"""
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    (result,) = nvrtc.nvrtcCompileProgram(program, 2, [b"--std=c++17", b"--gpu-architecture=sm_90a"])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    print(f"NVRTC {sys.argv[1]}, lambda of `{parameter}`: {result.name}")
    if parameter == "auto" and version < [13, 2]:
        assert result == nvrtc.nvrtcResult.NVRTC_ERROR_COMPILATION, "the behaviour has changed"
        assert b"is considered a host function" in log
    else:
        assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
PYTHON
for version in 13.1.115 13.2.51; do
  venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target "$version" "nvidia-cuda-nvrtc==$version"
  LD_LIBRARY_PATH=$work/$version/nvidia/cu13/lib LD_PRELOAD=libnvrtc.so.13 venv/bin/python compile.py "$version"
done
