#!/usr/bin/env bash
# ptxas serializes warpgroup products whose operand A is in registers, in a loop that makes the next A while a product runs.
# The same loop, unrolled by two, is not serialized.
#
# Versions: nvidia-cuda-nvrtc 13.0.88 and 13.5.37, cuda-bindings 13.5.0, Python 3.11. No GPU is needed.
# Seen: with `#pragma unroll 1`, "(C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma
#       instructions defining input registers of a wgmma between start and end of the pipeline stage". With `#pragma unroll 2`,
#       nothing. In both the next operand has variables of its own, which become A behind wait_group.
# Why it matters: PTX lets a warp write other registers while wgmma reads its own, and kernels that dequantize into operand A
#       depend on it. Rolled, the loop copies the next operand to A's registers at its end; unrolled by two, the two sets can
#       change roles. The message is in the log of a compilation that succeeds, which few programs print.
# Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check cuda-bindings==13.5.0
cat > compile.py <<'PYTHON'
import sys

from cuda.bindings import nvrtc

SOURCE = """
extern "C" __global__ void __launch_bounds__(128) kernel(const unsigned* codes, float* out, int n, unsigned long long b) {
  float d[4] = {};
  unsigned a[4], next[4];
  for (int i = 0; i < 4; i++) a[i] = codes[i * 128 + threadIdx.x];
#pragma unroll UNROLL
  for (int k = 1; k < n; k++) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    for (int i = 0; i < 4; i++) next[i] = codes[(4 * k + i) * 128 + threadIdx.x] & 0x000f000f;
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < 4; i++) {
      a[i] = next[i];
      asm volatile("" : "+f"(d[i]), "+r"(a[i]) :: "memory");
    }
  }
  for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = d[i];
}
"""

_, *version = nvrtc.nvrtcVersion()
assert version == [int(number) for number in sys.argv[1].split(".")[:2]], version
for unroll in (1, 2):
    _, program = nvrtc.nvrtcCreateProgram(SOURCE.replace("UNROLL", str(unroll)).encode(), b"kernel.cu", 0, [], [])
    options = [b"--std=c++17", b"--gpu-architecture=sm_90a", b"--ptxas-options=-v"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    assert b"Compiling entry function" in log
    serialized = b"wgmma.mma_async instructions are serialized due to non wgmma instructions defining input registers" in log
    print(f"NVRTC {sys.argv[1]}, unrolled by {unroll}: {'serialized' if serialized else 'not serialized'}")
    assert serialized == (unroll == 1), "the behaviour has changed"
PYTHON
for version in 13.0.88 13.5.37; do
  venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target "$version" "nvidia-cuda-nvrtc==$version"
  LD_LIBRARY_PATH=$work/$version/nvidia/cu13/lib LD_PRELOAD=libnvrtc.so.13 venv/bin/python compile.py "$version"
done
