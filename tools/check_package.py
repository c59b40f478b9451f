"""Build the source distribution and the wheel, install the wheel into a fresh environment, and use it there; used by
`make package`.

The fresh environment sees what the calling one has installed, but for sawkv, which comes from the wheel alone.
"""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys, torch, sawkv
from importlib.metadata import entry_points
assert sawkv.__file__.startswith(sys.prefix), sawkv.__file__
assert "sawkv" in entry_points(group="vllm.general_plugins").names
from sawkv import CacheFormat, PagedKVCache, PageLayout, append, gather
cache = PagedKVCache.allocate(PageLayout(CacheFormat("int8"), 2, 64, 16), 4)
k = torch.randn(40, 2, 64)
append(k, -k, cache, torch.arange(40), backend="cpu")
out, ends = torch.empty(2, 40, 2, 64), torch.tensor([0, 40], dtype=torch.int32)
gather(cache, torch.arange(4, dtype=torch.int32)[None], ends[1:], ends, *out, rotated=False, backend="cpu")
assert (out[0] - k).norm() < 0.02 * k.norm() and (out[1] + k).norm() < 0.02 * k.norm()
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="sawkv-package-") as temporary:
        folder = Path(temporary)
        # The wheel is built of the source distribution, so that this one is whole.
        subprocess.run(
            [sys.executable, "-m", "build", "--outdir", temporary, str(ROOT)], check=True, stdout=subprocess.DEVNULL
        )
        (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
        check_contents(wheel)
        environment = folder / "venv"
        venv.create(environment, with_pip=False)
        python = str(environment / "bin" / "python")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "-qq",
            "--disable-pip-version-check",
            "--no-deps",
            str(wheel),
        ]
        subprocess.run(pip, check=True)
        (packages,) = environment.glob("lib/python*/site-packages")
        (packages / "outer.pth").write_text(sysconfig.get_path("purelib"))
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "XDG_CACHE_HOME": str(folder / "cache")
        }
        for command in (["-c", PROGRAM], [str(environment / "bin" / "sawkv"), "--version"], ["-m", "sawkv", "formats"]):
            subprocess.run([python, *command], check=True, cwd=folder, env=clean, stdout=subprocess.DEVNULL)
        print(
            f"{wheel.name} ({wheel.stat().st_size:,} bytes) and {archive.name} ({archive.stat().st_size:,} bytes) are"
            " whole and work"
        )


def check_contents(wheel: Path) -> None:
    """Refuse a wheel without files of the package, or with links that lead nowhere on a package page."""
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        text = email.message_from_bytes(opened.read(metadata)).get_payload()
    tracked = subprocess.run(
        ["git", "ls-files", "src"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    missing = {name.removeprefix("src/") for name in tracked} - names
    if missing:
        sys.exit(f"the wheel: expected all files of src, got none of {', '.join(sorted(missing))}")
    dead = re.findall(r"\]\((?!https?:)[^)]*\)", str(text))
    if dead:
        sys.exit(f"the wheel's description: expected links with a host, got {', '.join(dead)}")


if __name__ == "__main__":
    main()
