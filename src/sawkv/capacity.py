"""What fits on a GPU: weights, KV cache and requests at once, predicted from a model's config.json before anything starts.

Follows vLLM's own arithmetic: the share of memory it may use, less weights, less the peak of a profiling step, less what loads outside of
torch, divided by the bytes of a page in all layers. The profiling step is estimated from shapes, so the result is within about 2%.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from sawkv.errors import SawkvError, UnsupportedError
from sawkv.format.layout import ENGINE_PAGE_SIZE, PageLayout
from sawkv.format.spec import CacheFormat

GIB: Final = 1 << 30
WIDE: Final = CacheFormat("bf16")
"""vLLM's own 16-bit cache."""

DRIVER_SHARE: Final = 0.9 / 80
"""Of a card's memory, what CUDA does not hand out. Measured: an H100 of 80 GiB reports 79.1."""

OUTSIDE_TORCH: Final = GIB // 2
"""Bytes of kernels, cuBLAS workspaces and the like that a start of vLLM adds. Measured: what the figures of one start on an H100 leave
unexplained (vLLM 0.26, Qwen3-8B in bf16, 394,576 tokens)."""

LARGE_CARD: Final = 70 * GIB
"""From here on vLLM takes larger defaults."""

CONCURRENT_STEPS: Final = 2
"""Steps that vLLM has in flight with asynchronous scheduling; a sliding window keeps pages for each."""

VOCAB_PADDING: Final = 64
_SIZES: Final = {"M": 1 << 20, "G": GIB, "T": 1 << 40}
_STORED_BYTES: Final = {"F64": 2, "F32": 2, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
"""Bytes on the GPU of a safetensors dtype; vLLM serves fp32 weights in 16 bits. All others take 1."""


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on.

    Attributes:
        windows: sliding window of each attention layer in tokens, 0 for full attention.
        experts: routed experts of a mixture-of-experts layer, 0 in a dense model; `top_k` of them run for a token.
        expert_size: intermediate size of an expert; `shared_size` of those that always run, together.
        dense_layers: layers with a dense MLP of `intermediate_size`.
        linear_bytes: bytes of a weight in linear layers, None if only the weights' files tell; embeddings take 2.
    """

    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    windows: tuple[int, ...]
    experts: int = 0
    top_k: int = 0
    expert_size: int = 0
    shared_size: int = 0
    dense_layers: int = 0
    linear_bytes: int | None = 2

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape that a Hugging Face config.json says.

        Raises:
            UnsupportedError: the model does not have plain attention in every layer, or a size is missing.
        """
        config = config.get("text_config", config)
        if config.get("kv_lora_rank"):
            raise UnsupportedError("plan: expected MHA, MQA or GQA, got MLA (multi-head latent attention), which sawkv does not serve")
        others = sorted(set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"})
        if others:
            raise UnsupportedError(f"plan: expected attention in every layer, got layers of {', '.join(others)}")
        try:
            q_heads, hidden, layers = config["num_attention_heads"], config["hidden_size"], config["num_hidden_layers"]
            experts = next((config[key] for key in ("num_experts", "n_routed_experts", "num_local_experts") if config.get(key)), 0)
            expert_size = config.get("moe_intermediate_size", config["intermediate_size"])
            shared = config.get("shared_expert_intermediate_size") or config.get("n_shared_experts", 0) * expert_size
            return cls(
                hidden_size=hidden,
                intermediate_size=config["intermediate_size"],
                num_q_heads=q_heads,
                num_kv_heads=config.get("num_key_value_heads") or q_heads,
                head_dim=config.get("head_dim") or hidden // q_heads,
                vocab_size=config["vocab_size"],
                tied=config.get("tie_word_embeddings", str(config.get("model_type")).startswith("gemma")),
                windows=_windows(config, layers),
                experts=experts,
                top_k=config.get("num_experts_per_tok", 0) if experts else 0,
                expert_size=expert_size if experts else 0,
                shared_size=shared if experts else 0,
                dense_layers=config.get("first_k_dense_replace", 0) if experts else layers,
                linear_bytes=_linear_bytes(config),
            )
        except KeyError as error:
            raise UnsupportedError(f"plan: expected {error} in config.json, got {', '.join(sorted(config))[:200]}") from error

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights: embeddings, attention and gated MLPs. Norms and biases are below 0.1% and left out.

        Raises:
            UnsupportedError: the weights are quantized in a way whose size config.json does not tell.
        """
        if self.linear_bytes is None:
            raise UnsupportedError("plan: expected the model's safetensors files beside config.json, which does not tell its weights' size")
        hidden = self.hidden_size
        embeddings = _round_up(self.vocab_size, VOCAB_PADDING) * hidden * (1 if self.tied else 2)
        attention = 2 * hidden * self.head_dim * (self.num_q_heads + self.num_kv_heads)
        dense = 3 * hidden * self.intermediate_size
        sparse = 3 * hidden * (self.experts * self.expert_size + self.shared_size) + hidden * self.experts
        layers = len(self.windows)
        linear = layers * attention + self.dense_layers * dense + (layers - self.dense_layers) * sparse
        return 2 * embeddings + self.linear_bytes * linear


@dataclass(frozen=True)
class Setting:
    """How vLLM is to be started. Defaults are those of its server.

    Attributes:
        gpu_memory: bytes of one card, as CUDA reports them.
        context: `--max-model-len`, in tokens.
        max_num_batched_tokens, max_num_seqs: None for vLLM's default on a card of this size.
        block_size: None for what a GPU gets: 16 in 16 bits, 64 in sawkv's formats.

    Raises:
        SawkvError: a value is out of range.
    """

    gpu_memory: int
    context: int
    gpu_memory_utilization: float = 0.90
    tensor_parallel: int = 1
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("context", "tensor_parallel", "max_num_batched_tokens", "max_num_seqs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SawkvError(f"{name.replace('_', '-')}: expected at least 1, got {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise SawkvError(f"gpu-memory-utilization: expected above 0 and at most 1, got {self.gpu_memory_utilization}")

    @property
    def batched_tokens(self) -> int:
        return self.max_num_batched_tokens or (8192 if self.gpu_memory >= LARGE_CARD else 2048)

    @property
    def seqs(self) -> int:
        return self.max_num_seqs or (1024 if self.gpu_memory >= LARGE_CARD else 256)

    def page_size(self, cache_format: CacheFormat) -> int:
        return self.block_size or (16 if cache_format == WIDE else ENGINE_PAGE_SIZE)


@dataclass(frozen=True)
class Plan:
    """Bytes on each card, and what the KV cache then holds.

    Attributes:
        kv_tokens: tokens as vLLM reports them: requests at once, times the context.
        requests: requests of the full context at once.
    """

    cache_format: CacheFormat
    usable: int
    weights: int
    activations: int
    workspace: int
    outside_torch: int
    kv_cache: int
    kv_tokens: int
    requests: float


def make_plan(shape: ModelShape, setting: Setting, cache_format: CacheFormat, weight_bytes: int | None = None) -> Plan:
    """What fits with KV caches in `cache_format`.

    Args:
        weight_bytes: of the whole model, where known; else counted from the shape.

    Raises:
        FormatError: the format does not fit head_dim.
        UnsupportedError: the tensor parallel size does not divide the heads.
    """
    ranks = setting.tensor_parallel
    if shape.num_q_heads % ranks or (shape.num_kv_heads % ranks and ranks % shape.num_kv_heads):
        raise UnsupportedError(f"tensor parallel: expected a divisor of {shape.num_q_heads} and {shape.num_kv_heads} heads, got {ranks}")
    usable = int(setting.gpu_memory * setting.gpu_memory_utilization)
    weights = (shape.weight_bytes if weight_bytes is None else weight_bytes) // ranks
    activations = _profile_peak(shape, setting)
    workspace = _prefill_workspace(shape, setting) if cache_format != WIDE else 0
    kv_cache = max(0, usable - weights - activations - workspace - OUTSIDE_TORCH)
    tokens, requests = kv_capacity(shape, cache_format, kv_cache, setting)
    return Plan(cache_format, usable, weights, activations, workspace, OUTSIDE_TORCH, kv_cache, tokens, requests)


def kv_capacity(shape: ModelShape, cache_format: CacheFormat, kv_bytes: int, setting: Setting) -> tuple[int, float]:
    """Tokens that vLLM reports for a KV cache of `kv_bytes` a card, and requests of the full context at once.

    vLLM splits layers of unlike windows into groups of equally many layers, which share memory: a page serves one layer of each group.
    """
    kv_heads = max(1, shape.num_kv_heads // setting.tensor_parallel)
    page_size = setting.page_size(cache_format)
    page_bytes = PageLayout(cache_format, kv_heads, shape.head_dim, page_size).span_bytes * kv_heads
    layers = [shape.windows.count(window) for window in dict.fromkeys(shape.windows)]
    group_size = min(layers) if max(layers) >= 1.5 * min(layers) else max(layers)
    blocks = kv_bytes // (page_bytes * group_size)
    in_flight = CONCURRENT_STEPS * setting.batched_tokens
    blocks_of_request = 0
    for window, count in zip(dict.fromkeys(shape.windows), layers, strict=True):
        needed = -(-setting.context // page_size)
        if window:
            needed = -(-min(window - 1 + in_flight, setting.context) // page_size) + 1
        blocks_of_request += -(-count // group_size) * needed
    requests = blocks / blocks_of_request
    return int(requests * setting.context), requests


def read_model(model: str) -> tuple[ModelShape, int | None]:
    """Shape of a checkpoint directory, or of a model on the Hugging Face hub; and the bytes of its weights, if they are in the directory.

    Raises:
        UnsupportedError: there is no config.json, or the model is not one that sawkv can serve.
    """
    folder = Path(model)
    if not folder.is_dir():
        config = _from_hub(model)
        return ModelShape.from_config(config), None
    if not (folder / "config.json").is_file():
        raise UnsupportedError(f"plan: expected a config.json in {model}, got none")
    shape = ModelShape.from_config(json.loads((folder / "config.json").read_text()))
    files = sorted(folder.glob("*.safetensors"))
    return shape, sum(map(_weight_bytes, files)) if files else None


def card_memory(size: str | None) -> int:
    """Bytes that CUDA reports for a card sold as `size`, such as 80GiB; without a size, for the card that is here.

    Cards are sold in GB and hold GiB, so both mean 2^30.

    Raises:
        SawkvError: the text says no size.
        UnsupportedError: no size is given, and there is no card.
    """
    if size is None:
        import torch

        if not torch.cuda.is_available():
            raise UnsupportedError("plan: expected --gpu-memory where there is no GPU, got none")
        return torch.cuda.mem_get_info()[1]
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])i?B?", size, re.ASCII | re.IGNORECASE)
    if match is None or not float(match[1]):
        raise SawkvError(f"size: expected a number with a unit such as 80GiB, got {size!r}")
    return int(float(match[1]) * _SIZES[match[2].upper()] * (1 - DRIVER_SHARE))


def report(plans: list[Plan], setting: Setting) -> str:
    """Plans side by side, 16 bits first, with what was assumed."""
    rows = [
        ("usable by vLLM", [f"{plan.usable / GIB:.2f} GiB" for plan in plans]),
        ("weights", [f"{plan.weights / GIB:.2f} GiB" for plan in plans]),
        ("activations", [f"{plan.activations / GIB:.2f} GiB" for plan in plans]),
        ("prefill workspace", [f"{plan.workspace / GIB:.2f} GiB" for plan in plans]),
        ("outside of torch", [f"{plan.outside_torch / GIB:.2f} GiB" for plan in plans]),
        ("KV cache", [f"{plan.kv_cache / GIB:.2f} GiB" for plan in plans]),
        ("KV cache, tokens", [f"{plan.kv_tokens:,}" for plan in plans]),
        (f"requests of {setting.context:,} at once", [f"{plan.requests:.1f}" for plan in plans]),
    ]
    lines = [f"{'':<30}" + "".join(f"{plan.cache_format!s:>18}" for plan in plans)]
    lines += [f"{name:<30}" + "".join(f"{cell:>18}" for cell in cells) for name, cells in rows]
    if plans[0].kv_tokens:
        lines.append(f"{'tokens, ratio':<30}" + "".join(f"{plan.kv_tokens / plans[0].kv_tokens:>17.2f}x" for plan in plans))
    page_sizes = ", ".join(str(setting.page_size(plan.cache_format)) for plan in plans)
    memory, share = f"{setting.gpu_memory / GIB:.1f} GiB", f"{setting.gpu_memory_utilization:.0%}"
    lines += [
        "",
        f"Assumed: {memory} reported by CUDA, {share} of it for vLLM and no other program;",
        f"--max-num-batched-tokens {setting.batched_tokens}, --max-num-seqs {setting.seqs}, --block-size {page_sizes};",
        "no LoRA, no speculative decoding; activations as in vLLM's profiling step (the larger of an MLP's and the logits);",
        "outside of torch as measured once on an H100.",
    ]
    if any(not plan.kv_tokens for plan in plans):
        lines.append("The weights do not fit: use more cards (--tensor-parallel) or larger ones.")
    return "\n".join(lines)


def _profile_peak(shape: ModelShape, setting: Setting) -> int:
    """Peak bytes of vLLM's profiling step: `batched_tokens` through an MLP, then logits of `seqs` tokens in 16 and 32 bits."""
    tokens, ranks = setting.batched_tokens, setting.tensor_parallel
    dense = 3 * shape.intermediate_size // ranks if shape.dense_layers else 0  # gate and up, and their product
    expert = shape.expert_size // ranks
    sparse = shape.top_k * (max(2 * expert, shape.hidden_size) + expert)  # the second product may reuse the first one's memory
    mlp = 2 * tokens * (shape.hidden_size + max(dense, sparse))
    logits = 2 * tokens * shape.hidden_size + min(tokens, setting.seqs) * shape.vocab_size * (2 + 4)
    return max(mlp, logits)


def _prefill_workspace(shape: ModelShape, setting: Setting) -> int:
    """Bytes of 16-bit K and V into which the plugin decodes pages for prefill (integrations/vllm/prefill.py: workspace_tokens)."""
    tokens = max(setting.context, 2 * setting.batched_tokens)
    return tokens * 2 * max(1, shape.num_kv_heads // setting.tensor_parallel) * shape.head_dim * 2


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    window, model_type = config.get("sliding_window") or 0, str(config.get("model_type"))
    if not config.get("use_sliding_window", not model_type.startswith("qwen")):
        window = 0
    types = config.get("layer_types")
    if types:
        return tuple(window if kind == "sliding_attention" else 0 for kind in types[:layers])
    pattern = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6}.get(model_type, 0)  # every n-th layer has full attention
    pattern = config.get("sliding_window_pattern", pattern)
    return tuple(0 if pattern and (i + 1) % pattern == 0 else window for i in range(layers))


def _linear_bytes(config: Mapping[str, Any]) -> int | None:
    method = (config.get("quantization_config") or {}).get("quant_method")
    return {None: 2, "fp8": 1}.get(method)


def _weight_bytes(file: Path) -> int:
    """Bytes that the tensors of a safetensors file take on the GPU, from its header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    return sum(prod(tensor["shape"]) * _STORED_BYTES.get(tensor["dtype"], 1) for tensor in tensors)


def _from_hub(model: str) -> dict[str, Any]:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise UnsupportedError(f"plan: expected a checkpoint directory, or huggingface_hub installed, got {model!r}") from error
    try:
        config: dict[str, Any] = json.loads(Path(hf_hub_download(model, "config.json")).read_text())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnsupportedError(
            f"plan: expected a checkpoint directory or a model of the Hugging Face hub, got {model!r}: {error}"
        ) from error
    return config


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
