"""Look up known vulnerabilities of everything installed in an environment, with pip-audit; used by `make audit`.

Exit status: 0 if none is known, 1 if one is, 2 if nothing could be looked up (pip-audit itself reports success then).
`--if-reachable` turns 2 into 0 and a warning, for CI without access to the advisory service.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the environment's folder")
    parser.add_argument("--if-reachable", action="store_true", help="only warn if nothing could be looked up")
    args = parser.parse_args()
    freeze = [
        str(args.folder / "bin" / "python"),
        "-m",
        "pip",
        "freeze",
        "--exclude-editable",
        "--disable-pip-version-check",
    ]
    installed = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
    # Local builds such as 2.13.0+cpu by their release.
    pinned = [line.split("+")[0] for line in installed.splitlines() if "==" in line]
    with tempfile.TemporaryDirectory(prefix="sawkv-audit-") as temporary:
        folder = Path(temporary)
        # Of its own: the tool's dependencies must not change what is audited.
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "pip-audit"], check=True)
        requirements = folder / "requirements.txt"
        requirements.write_text("\n".join(pinned))
        command = [python, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json", "-r", str(requirements)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if not done.stdout.strip():
        sys.exit(done.stderr[-2000:])
    found = json.loads(done.stdout)["dependencies"]
    audited = [entry for entry in found if "skip_reason" not in entry]
    vulnerable = [entry for entry in audited if entry["vulns"]]
    for entry in vulnerable:
        print(f"{entry['name']} {entry['version']}: {', '.join(vuln['id'] for vuln in entry['vulns'])}")
    print(f"{len(audited)} of {len(found)} packages looked up, {len(vulnerable)} with known vulnerabilities")
    if vulnerable:
        return 1
    if not audited:
        print("nothing was audited: the advisory service cannot be reached from here", file=sys.stderr)
        return 0 if args.if_reachable else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
