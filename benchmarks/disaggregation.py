"""Prefill in one engine, decode in another: pages that vLLM's NIXL connector carries between two processes of a CPU.

    pip install nixl && python -m benchmarks.disaggregation models/sawkv-6m

One engine computes a prompt and its greedy answer. For each case an engine in another process reads the prompt's pages
from the first, and answers:

    equal          the same setting: the answer must be equal, and all pages must come from the first
    page size, format, calibration
                   that differs: the handshake must refuse, and the message must show both ends
    control        another format that claims the first one's fingerprint: the answer must be wrong

`offered`: tokens that the first engine offered. Each case is written to docs/results/disaggregation.jsonl. The exit
status is 1 if one is not as expected.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.engines import MARK, git_head
from benchmarks.plots import RESULTS, append_record
from sawkv.cli import end_as_by_ctrl_c
from sawkv.integrations.vllm.server import STOP_TIMEOUT, running
from sawkv.prepare import corpus

BLOCK: Final = 32
PROMPT: Final = 200
"""Tokens of the prompt."""
ANSWER: Final = 24
PREPARED: Final[dict[str, Any]] = {"prepare": True}
OTHER: Final[dict[str, Any]] = {"prepare": False, "format": "int4-k64-v64"}
CASES: Final[dict[str, dict[str, Any]]] = {
    "equal": {"entry": PREPARED},
    "page size": {"entry": PREPARED, "block": 16},
    "format": {"entry": OTHER},
    "calibration": {"entry": {"prepare": False}},
    "control": {"entry": OTHER, "claims": True},
}
PORTS: Final = {"prefill": "5610", "decode": "5620"}
WAIT: Final = 300.0
"""Seconds to wait for another process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--commit", help="what is measured (default: git's HEAD)")
    parser.add_argument("--output", type=Path, default=RESULTS / "disaggregation.jsonl")
    parser.add_argument("--engine", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        print(f"\n{MARK}{json.dumps(_engine(args.model, **args.engine))}")
        return
    commit = args.commit or git_head()
    failed = False
    end_as_by_ctrl_c()
    with (
        tempfile.TemporaryDirectory(prefix="sawkv-disaggregation-") as name,
        _started(args.model, folder := Path(name), "prefill", requests=len(CASES)) as prefill,
    ):
        _wait(folder / "prefill.json", prefill)
        for i, (case, setting) in enumerate(CASES.items()):
            with _started(args.model, folder, "decode", request=i, **setting) as decode:
                found = _result(decode, folder / "decode.log")
            fault = check(case, found)
            failed |= fault is not None
            print(f"{case}: {fault or 'as expected'}; {found}", flush=True)
            append_record(args.output, {"commit": commit, "case": case, "fault": fault, **found})
    sys.exit(failed)


def check(case: str, found: dict[str, Any]) -> str | None:
    """What is not as the case expects, or None. `found` is what `_engine` returns, with `refusal`: the log's line."""
    ends = found["refusal"].count("sawkv ")
    match case:
        case "equal":
            good = found["answer"] == found["expected"] and found["offered"] == PROMPT and not ends
        case "control":
            good = found["answer"] not in (found["expected"], []) and found["offered"] == PROMPT
        case _:
            good = found["finish"] == "error" and ends == 2
    return None if good else f"{case} is not as expected"


@contextlib.contextmanager
def _started(model: str, folder: Path, role: str, **setting: Any) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": PORTS[role],
    }
    job = json.dumps({"role": role, "folder": str(folder), **setting})
    command = [sys.executable, "-m", "benchmarks.disaggregation", model, "--engine", job]
    pipes = {"stderr": subprocess.STDOUT, "env": os.environ | environment}
    with (folder / f"{role}.log").open("wb") as log, running(command, STOP_TIMEOUT, stdout=log, **pipes) as engine:
        yield engine


def _wait(file: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT
    while not file.exists():
        if time.monotonic() > deadline or process.poll() is not None:
            raise SystemExit(f"expected {file.name}: see {file.parent}")
        time.sleep(0.5)


def _result(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    process.wait(WAIT)
    lines = log.read_text(errors="replace").splitlines()
    found = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    if not found:
        raise SystemExit("\n".join(lines[-40:]))
    refusal = next((line for line in lines if "RuntimeError: NIXL compatibility hash mismatch" in line), "")
    result: dict[str, Any] = found[0]
    return result | {"refusal": refusal.partition("RuntimeError: ")[2].partition(". Prefill and")[0]}


def _engine(
    model: str,
    role: str,
    folder: str,
    entry: dict[str, Any] | None = None,
    block: int = BLOCK,
    claims: bool = False,
    request: int = 0,
    requests: int = 0,
) -> dict[str, Any]:
    """In a process of its own. `claims`: take the first engine's string in the handshake. `requests`: to prefill."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.v1.metrics.reader import Counter

    from sawkv.integrations.vllm import offload

    shared, whole = Path(folder), PREPARED if entry is None else entry
    said: list[str] = []
    summary = offload.summary

    def say(written_with: dict[str, Any]) -> str:
        peer = json.loads((shared / "prefill.json").read_text())["summary"] if claims else None
        said.append(peer or summary(written_with))
        return said[-1]

    offload.summary = say
    llm = LLM(
        model,
        kv_cache_dtype="int4_per_token_head",
        additional_config={"sawkv": whole | {"prepare_cache": str(shared / "prepared")}},
        enforce_eager=True,
        max_model_len=512,
        block_size=block,
        kv_cache_memory_bytes=16 << 20,
        disable_log_stats=False,
        kv_transfer_config={
            "kv_connector": "NixlConnector",
            "kv_role": "kv_producer" if role == "prefill" else "kv_consumer",
            "kv_buffer_device": "cpu",
            "kv_load_failure_policy": "fail",
        },
    )

    encode = llm.get_tokenizer().encode
    prompt = corpus.preparation_windows(lambda text: encode(text, add_special_tokens=False), PROMPT, 2)[1].tolist()

    def ask(max_tokens: int, parameters: dict[str, Any] | None = None) -> Any:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=parameters and {"kv_transfer_params": parameters},
        )
        (output,) = llm.generate(TokensPrompt(prompt_token_ids=prompt), sampling, use_tqdm=False)
        return output

    if role == "prefill":
        answer = list(ask(ANSWER).outputs[0].token_ids)
        found = [ask(1, {"do_remote_decode": True, "do_remote_prefill": False}) for _ in range(requests)]
        content = {"answer": answer, "summary": said[0], "parameters": [each.kv_transfer_params for each in found]}
        part = shared / "part"
        part.write_text(json.dumps(content))
        part.rename(shared / "prefill.json")
        time.sleep(len(CASES) * WAIT)  # or until it is ended
        return {}
    peer = json.loads((shared / "prefill.json").read_text())
    output = ask(ANSWER, peer["parameters"][request])
    counters = {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}
    return {
        "expected": peer["answer"],
        "answer": list(output.outputs[0].token_ids),
        "finish": output.outputs[0].finish_reason,
        "offered": counters["vllm:external_prefix_cache_hits"],
    }


if __name__ == "__main__":
    main()
