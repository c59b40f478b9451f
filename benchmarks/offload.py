"""Prefixes from host memory compared with computing them: vLLM's native offloading with 16-bit and INT4 pages.

    python -m benchmarks.offload                       # Qwen3-8B's shape, random weights, 64 prefixes of 16k tokens
    python -m benchmarks.offload --model models/sawkv-6m --prefixes 16 --tokens 512 --gpu-cache 0.0075 \
        --host-memory 0.1 --spec HostTieringSpec      # on a CPU, to try this file

The GPU's cache is made so small that a few prefixes fit, and host memory holds all. Each prefix is computed once, with
a question behind it, and asked again when all others have been computed: it must come from host memory. A third round
counts the bytes. An engine per format, in a process of its own. Each is written to docs/results/offload.jsonl:

    computed_s, restored_s   mean time to first token, from vLLM's RequestOutput.metrics, requests one at a time
    load_bytes_per_token     bytes that the connector moved to the GPU, per token that was not computed again
    page_bytes_per_token     bytes of a token in the GPU's pages: fewer moved bytes mean tokens found elsewhere
    load_gb_s                those bytes over the time of the copies, as vLLM measures it
    equal_texts              answers that are those of the computed prefix, token by token. Chunks differ, so a near-tie
                             may fall otherwise

The exit status is 1 unless each prefix came back whole, INT4's restored_s is at most 0.35 of its computed_s, and its
bytes are at most 0.28 of 16 bits'.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import prometheus_client

from benchmarks import engines
from benchmarks.engines import PEERS
from benchmarks.plots import append_record
from sawkv.cli import end_as_by_ctrl_c

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

GIB: Final = 1 << 30
QUESTION: Final = 64
"""Tokens behind a prefix."""
ANSWER: Final = 8
COMPANION: Final = 64
"""Tokens that a request beside a prefix decodes: more steps than a copy takes."""
MOST_TIME: Final = 0.35
MOST_BYTES: Final = 0.28
COUNTERS: Final = ("kv_offload_load_bytes", "kv_offload_load_time")
OLDER: Final = {
    "kv_offload_load_bytes": ("kv_offload_total_bytes", "CPU_to_GPU"),
    "kv_offload_load_time": ("kv_offload_total_time", "CPU_to_GPU"),
    "kv_offload_store_bytes": ("kv_offload_total_bytes", "GPU_to_CPU"),
}
"""Names in older versions of vLLM, with their label `transfer_type`."""
HELD: Final = 0.9
"""Of a page's bytes: how much must come from host memory. The cache is rounded to whole blocks, so not all of it."""
SHARE: Final = 0.9
"""Of host memory that is filled: what is stored last must not drive out what is asked for first."""


def main() -> None:
    args = _arguments()
    if args.engine_of:
        _run_engine(args)
        return
    end_as_by_ctrl_c()
    records = []
    with engines.model_folder(args.model) as model:
        for name in args.formats:
            words = ["--model", model, "--commit", args.commit]
            log = engines.log_of(args, "offload", name)
            found = list(engines.run_apart("benchmarks.offload", name, words, log, args.budget))
            if not found:
                raise SystemExit(f"{name}: expected a record, got none")
            records += found
            append_record(args.output, found[0])
    print("\n".join(check(records) or ["all limits are kept"]))
    sys.exit(bool(check(records)))


def check(records: list[dict[str, Any]]) -> list[str]:
    """What of the records breaks a limit. Each has the fields of the module's docstring, `format`, `prefixes`,
    `tokens`, `cached`: the tokens of each prefix that were not computed again, and `whole`: those in whole blocks.
    """
    faults = []
    for record in records:
        if len(record["cached"]) != record["prefixes"] or min(record["cached"]) < record["whole"]:
            faults.append(
                f"{record['format']}: expected {record['prefixes']} prefixes back, of {record['whole']} tokens, got"
                f" {record['cached']}"
            )
        if record["load_bytes_per_token"] < record["page_bytes_per_token"] * HELD:
            faults.append(
                f"{record['format']}: expected {record['page_bytes_per_token']:,.0f} bytes per token from host memory,"
                f" got {record['load_bytes_per_token']:,.0f}: the GPU's cache holds {record['kv_tokens']:,} tokens"
                " (--gpu-cache)"
            )
        ratio = record["restored_s"] / record["computed_s"]
        if record["format"] not in PEERS and ratio > MOST_TIME:
            faults.append(f"{record['format']}: expected at most {MOST_TIME} of the time to compute, got {ratio:.3f}")
    moved = {record["format"]: record["load_bytes_per_token"] for record in records}
    for name in moved.keys() - PEERS.keys():
        if "bf16" in moved and moved[name] > MOST_BYTES * moved["bf16"]:
            faults.append(f"{name}: expected at most {MOST_BYTES} of 16 bits' bytes, got {moved[name] / moved['bf16']}")
    return faults


def _arguments() -> argparse.Namespace:
    parser = engines.arguments(__doc__, ["bf16", "int4-k128-v128"], "offload.jsonl")
    parser.add_argument(
        "--prefixes", type=int, default=64, help="fewer where host memory does not hold them (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="of a prefix (default: %(default)s)")
    parser.add_argument("--gpu-cache", type=float, default=3.0, help="GiB of KV cache (default: %(default)s)")
    parser.add_argument("--host-memory", type=float, default=64.0, help="GiB for pages (default: %(default)s)")
    parser.add_argument("--spec", help="spec_name of vLLM's connector (on a CPU: HostTieringSpec)")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="more arguments of vllm.LLM")
    parser.add_argument("--budget", type=float, default=1800, help="seconds for one format (default: %(default)s)")
    parser.add_argument("--engine-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_engine(args: argparse.Namespace) -> None:
    """In the format's own process: start vLLM, compute the prefixes, ask for them again, print one marked line."""
    name = args.engine_of
    extra: dict[str, Any] = {"cpu_bytes_to_use": int(args.host_memory * GIB)}
    if args.spec:
        extra["spec_name"] = args.spec
    options = {
        "max_model_len": args.tokens + QUESTION + ANSWER,
        "kv_cache_memory_bytes": int(args.gpu_cache * GIB),
        "kv_transfer_config": {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        },
        **args.engine,
    }
    llm = engines.start_engine(name, args.model, prepare=not args.no_prepare, **options)
    config = llm.llm_engine.vllm_config
    draw = np.random.default_rng(args.tokens)
    vocabulary = config.model_config.get_vocab_size()
    prompts = [draw.integers(0, vocabulary, args.tokens + QUESTION).tolist() for _ in range(args.prefixes + 1)]

    _ask(llm, prompts.pop())  # compile what was not compiled at start-up
    _settle(llm, draw, vocabulary)
    stored = _counter("kv_offload_store_bytes")
    prefixes = min(args.prefixes, int(SHARE * args.host_memory * GIB / stored) - 1)
    if prefixes < 2:
        raise SystemExit(
            f"{name}: expected --host-memory for 2 prefixes of {stored:,.0f} bytes, got {args.host_memory}"
        )
    computed = [_ask(llm, prompt) for prompt in prompts[:prefixes]]
    _settle(llm, draw, vocabulary)
    restored = [_ask(llm, prompt) for prompt in prompts[:prefixes]]
    _settle(llm, draw, vocabulary)
    before = {key: _counter(key) for key in COUNTERS}
    counted = [_ask(llm, prompt, beside=draw.integers(0, vocabulary, 4).tolist()) for prompt in prompts[:prefixes]]
    _settle(llm, draw, vocabulary)
    moved = {key: _counter(key) - before[key] for key in COUNTERS}
    block = config.cache_config.block_size
    kv_tokens = (config.cache_config.num_gpu_blocks or 0) * block
    cached = [output.num_cached_tokens or 0 for output in restored]
    record = {
        **engines.measured(args, args.model, name),
        "prefixes": prefixes,
        "tokens": args.tokens,
        "whole": args.tokens // block * block,
        "cached": cached,
        "kv_tokens": kv_tokens,
        "computed_s": _first_token(computed),
        "restored_s": _first_token(restored),
        "page_bytes_per_token": args.gpu_cache * GIB / kv_tokens,
        "load_bytes_per_token": moved["kv_offload_load_bytes"] / max(1, sum(o.num_cached_tokens or 0 for o in counted)),
        "load_gb_s": moved["kv_offload_load_bytes"] / max(1e-9, moved["kv_offload_load_time"]) / 1e9,
        "equal_texts": sum(
            list(a.outputs[0].token_ids) == list(b.outputs[0].token_ids)
            for a, b in zip(computed, restored, strict=True)
        ),
    }
    engines.say(
        f"{name}: {prefixes} prefixes of {args.tokens:,} tokens, first token {record['computed_s']:.3f} s computed,"
        f" {record['restored_s']:.3f} s from host memory; {record['load_bytes_per_token']:,.0f} bytes per token at"
        f" {record['load_gb_s']:.1f} GB/s; {record['equal_texts']} answers equal",
        **record,
    )


def _ask(llm: LLM, prompt: list[int], *, beside: list[int] | None = None) -> RequestOutput:
    """The answer to a prompt, alone or beside a short one that decodes while a prefix is brought back.

    `LLM` of vLLM 0.26 drops the counters of a step without outputs. On a GPU a prefix arrives in such steps, unless
    another request decodes meanwhile.
    """
    from vllm import SamplingParams, TokensPrompt

    prompts, lengths = [prompt], [ANSWER]
    if beside is not None:
        prompts, lengths = [beside, prompt], [COMPANION, ANSWER]
    sampling = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    return llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)[-1]


def _settle(llm: LLM, draw: np.random.Generator, vocabulary: int) -> None:
    """Let what was queued end: vLLM looks at its copies in the steps of other requests."""
    for _ in range(4):
        _ask(llm, draw.integers(0, vocabulary, 4).tolist())


def _first_token(outputs: list[RequestOutput]) -> float:
    """Mean time to first token in seconds."""
    return float(np.mean([output.metrics.first_token_latency for output in outputs if output.metrics is not None]))


def _counter(name: str) -> float:
    """From Prometheus' registry: `LLM.get_metrics` cuts seconds to whole ones."""
    samples = [sample for family in prometheus_client.REGISTRY.collect() for sample in family.samples]
    older, direction = OLDER.get(name, (name, None))
    for wanted, labelled in ((name, None), (older, direction)):
        found = [
            sample.value
            for sample in samples
            if sample.name == f"vllm:{wanted}_total" and labelled in (None, sample.labels.get("transfer_type"))
        ]
        if found:
            return sum(found)
    raise SystemExit(f"expected the metric vllm:{name}, got {sorted({s.name for s in samples if 'offload' in s.name})}")


if __name__ == "__main__":
    main()
