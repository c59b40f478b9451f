"""The output of `sawkv plan`: plans side by side in 80 columns, or as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from sawkv.capacity.host import LINK, HostPlan
from sawkv.capacity.memory import BATCH_DEFAULTS, GIB, SMALL_BATCH_CARDS, Plan, Setting
from sawkv.capacity.model import ModelShape
from sawkv.capacity.weights import Weights

COLUMNS = 79


def table(plans: Sequence[Plan], setting: Setting, hosts: Sequence[HostPlan] = ()) -> str:
    """One column per plan, 16 bits first. `hosts`: of the same columns, or empty."""
    rows: list[tuple[str, list[str]]] = [
        (name, [f"{getattr(plan, field) / GIB:.2f} GiB" for plan in plans])
        for name, field in (
            ("usable by vLLM", "usable"),
            ("weights", "weights"),
            ("activations", "activations"),
            ("workspace", "workspace"),
            ("counts of tokens", "token_counts"),
            ("outside of torch", "outside_torch"),
            ("KV cache", "kv_cache"),
        )
    ]
    rows.append(("bytes per token", [f"{plan.bytes_per_token:,}" for plan in plans]))
    if any(plan.state_bytes_per_request for plan in plans):
        rows.append(("states of a request", [f"{plan.state_bytes_per_request / (1 << 20):,.1f} MiB" for plan in plans]))
    rows += [
        ("block, tokens", [f"{plan.block_size:,}" for plan in plans]),
        (
            "least prefix hit, tokens",
            [f"{plan.least_prefix_hit:,}" if plan.least_prefix_hit else "-" for plan in plans],
        ),
        ("KV cache, tokens", [f"{plan.tokens:,}" for plan in plans]),
        (f"requests of {setting.context:,} at once", [f"{plan.requests:,.1f}" for plan in plans]),
    ]
    if plans[0].tokens:
        rows.append(("tokens, ratio", [f"{plan.tokens / plans[0].tokens:.2f}x" for plan in plans]))
    if hosts:
        prefix = hosts[0].prefix
        rows += [
            ("host memory, tokens", [f"{host.tokens:,}" for host in hosts]),
            (f"bringing {prefix:,} tokens back", [f"{host.seconds * 1000:,.1f} ms" for host in hosts]),
            ("break-even prefill, tokens/s", [f"{host.break_even:,.0f}" for host in hosts]),
        ]
        if hosts[0].computed is not None:
            rows.append((f"computing {prefix:,} tokens", [f"{host.computed or 0:,.2f} s" for host in hosts]))
    rows.insert(0, ("", [plan.format for plan in plans]))
    last = max(17, len(plans[-1].format) + 1)  # vLLM's own formats have short names
    width = (COLUMNS - 30 - last) // (len(plans) - 1)
    return "\n".join(
        f"{name:<30}" + "".join(f"{cell:>{width}}" for cell in cells[:-1]) + f"{cells[-1]:>{last}}"
        for name, cells in rows
    )


def curve(ladder: Sequence[Plan], wide: Plan) -> str:
    """What each format holds: bits of a value with its share of scales, and tokens.

    Args:
        ladder: plans of sawkv's formats, most bits first.
        wide: that of 16 bits.
    """
    lines = [f"{'--format':<23}{'bits':>8}{'KV cache, tokens':>24}{'ratio':>8}"]
    for plan in ladder:
        ratio = f"{plan.tokens / wide.tokens:.2f}x" if wide.tokens else ""
        lines.append(f"{plan.format:<23}{_bits(plan, wide):>8.2f}{plan.tokens:>24,}{ratio:>8}")
    return "\n".join(lines)


def _bits(plan: Plan, wide: Plan) -> float:
    return 16 * plan.bytes_per_token_of_all_stages / wide.bytes_per_token_of_all_stages


def assumptions(setting: Setting, shape: ModelShape, weights: Weights, drafts: str) -> list[str]:
    """The assumptions behind the figures, one sentence each. `drafts`: that of speculative decoding."""
    batch = f"--max-num-batched-tokens {setting.batched_tokens}, --max-num-seqs {setting.seqs}"
    if (
        not setting.gpu_name
        and setting.max_num_batched_tokens is None
        and setting.batched_tokens > BATCH_DEFAULTS[-1][1]
    ):
        small = " or ".join(name.upper() for name in SMALL_BATCH_CARDS)
        batch += " (an {} gets {} and {}: give them)".format(small, *BATCH_DEFAULTS[-1][1:])
    lines = [
        (
            f"{setting.gpu_memory / GIB:.1f} GiB reported by CUDA, {setting.gpu_memory_utilization:.0%} of it for vLLM,"
            " and no other program."
        ),
        f"{batch}.",
        f"Weights {weights.source}.",
        f"No LoRA, {drafts}, {'prefix' if setting.prefix_caching else 'no prefix'} caching.",
        (
            "Activations as in vLLM's profiling step: the largest of an MLP's, of the projection before a state, and of"
            " the logits. Counts of tokens, for penalties, as in vLLM 0.33. Outside of torch as measured on an H100."
        ),
    ]
    cards = setting.tensor_parallel * setting.pipeline_parallel
    if cards > 1:
        one = "the fullest" if setting.pipeline_parallel > 1 else "each"
        lines.insert(0, f"Bytes are those of {one} of {cards} cards, tokens and requests those of all together.")
    if shape.sees:
        lines.append("Weights that read images or audio are counted; what they compute while vLLM profiles is not.")
    return lines


def shortage(plan: Plan, setting: Setting, longest: int) -> str:
    """Why vLLM would not start, and what helps.

    Args:
        longest: longest context with which it would start.
    """
    if longest:
        return (
            f"{plan.format}: the KV cache has no room for one request of {setting.context:,} tokens. vLLM starts with "
            f"--max-model-len {longest} or less, or with more or larger cards (--tensor-parallel)."
        )
    taken = (
        f"weights {plan.weights / GIB:.2f} and activations {plan.activations / GIB:.2f} GiB of {plan.usable / GIB:.2f}"
    )
    return (
        f"{plan.format}: no room is left for a KV cache ({taken}): use more cards (--tensor-parallel) or larger ones."
    )


def narrower_states(plan: Plan, narrow: Plan) -> str:
    """What a hybrid whose recurrent states have 32 bits would hold with states of 16 bits.

    Args:
        plan, narrow: with states of 32 and of 16 bits.
    """
    return (
        f"Recurrent states have 32 bits. With 16 bits (--mamba-ssm-cache-dtype bfloat16) {plan.format} would hold"
        f" {narrow.tokens:,} tokens instead of {plan.tokens:,}; their effect on accuracy was not measured."
    )


def link_assumption() -> str:
    """What `HostPlan` rests on."""
    return (
        f"{LINK / 1e9:.0f} GB/s between host memory and each card (PCIe 5.0 x16). The break-even is the"
        " speed of prefill at which a prefix is computed as fast as it is brought back."
    )


def text(
    plans: Sequence[Plan],
    setting: Setting,
    assumed: Sequence[str],
    notes: Sequence[str],
    hosts: Sequence[HostPlan] = (),
    ladder: Sequence[Plan] = (),
) -> str:
    """The table, all formats, the assumptions, then notes for the user."""
    listed = "\n".join(["Assumed:", *(_fill(line, bullet="- ") for line in assumed)])
    more = [curve(ladder, plans[0])] if ladder else []
    return "\n\n".join([table(plans, setting, hosts), *more, listed, *map(_fill, notes)])


def as_json(
    model: str,
    plans: Sequence[Plan],
    setting: Setting,
    assumed: Sequence[str],
    notes: Sequence[str],
    hosts: Sequence[HostPlan] = (),
    ladder: Sequence[Plan] = (),
) -> str:
    """The same as JSON. Bytes are of one card."""
    values = {
        "model": model,
        "gpu_memory": setting.gpu_memory,
        "context": setting.context,
        "tensor_parallel": setting.tensor_parallel,
        "pipeline_parallel": setting.pipeline_parallel,
        "max_num_batched_tokens": setting.batched_tokens,
        "max_num_seqs": setting.seqs,
        "formats": [asdict(plan) for plan in plans],
        "curve": [
            {"format": plan.format, "bits": round(_bits(plan, plans[0]), 4), "tokens": plan.tokens} for plan in ladder
        ],
        **({"host": [asdict(host) for host in hosts]} if hosts else {}),
        "assumed": list(assumed),
        "notes": list(notes),
    }
    return json.dumps(values, indent=1)


def _fill(paragraph: str, bullet: str = "") -> str:
    indent = " " * len(bullet)
    return textwrap.fill(paragraph, COLUMNS, initial_indent=bullet, subsequent_indent=indent, break_on_hyphens=False)
