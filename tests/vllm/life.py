"""One engine in a process of its own, looked at from within: bytes of pages, a NaN in one request, and what was
counted. Prints JSON.
"""

from __future__ import annotations

import json
import os
from typing import Any

from tests.conftest import MODEL

MARK = "RESULT "
CHUNK, BLOCK = 64, 32
PROMPT = [300 + i * 7919 % 3000 for i in range(200)]
OTHER = [300 + i * 104729 % 3000 for i in range(200)]


def main() -> None:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
    import prometheus_client
    import torch
    from vllm import LLM, SamplingParams

    from sawkv import ops
    from sawkv.integrations.vllm import backend, metrics
    from sawkv.kernels.reference import planes

    metrics.INTERVAL = 0.0  # type: ignore[misc]
    llm = LLM(
        str(MODEL),
        kv_cache_dtype="int4_per_token_head",
        additional_config={"sawkv": {"prepare": False}},
        enforce_eager=True,
        max_model_len=512,
        block_size=BLOCK,
        max_num_batched_tokens=CHUNK,
        kv_cache_memory_bytes=16 << 20,
        disable_log_stats=False,
    )
    seen: dict[str, Any] = {}
    forward = backend.SawAttentionImpl.forward

    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = kwargs["attn_metadata"] if "attn_metadata" in kwargs else args[5]
        if metadata is not None:
            (step,) = metadata.steps.values()
            seen["table"], seen["length"] = step.block_table[0].clone(), int(step.seq_lens[0])
        return forward(self, *args, **kwargs)

    backend.SawAttentionImpl.forward = remember  # type: ignore[method-assign]
    impls = [layer.impl for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()]

    appended_tokens, cached_tokens = 0, []

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        nonlocal appended_tokens
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        # vLLM 0.27's counter of hits loses some after a reset.
        for output, prompt in zip(outputs, prompts, strict=True):
            cached_tokens.append(output.num_cached_tokens)
            appended_tokens += len(prompt) - cached_tokens[-1] + max_tokens - 1  # the last token is not appended
        return [list(output.outputs[0].token_ids) for output in outputs]

    def bytes_of_prompt(prompt: list[int]) -> torch.Tensor:
        """All bytes of the prompt's tokens: [layers, tokens, bytes]."""
        generate([prompt], 1)
        assert seen["length"] == len(prompt)
        position = torch.arange(len(prompt))
        page, offset = seen["table"][position // BLOCK].long(), position % BLOCK
        return torch.stack(
            [
                torch.cat([plane[page, :, offset].flatten(1) for plane in planes(impl._attention.cache)], 1)
                for impl in impls
            ]
        )

    def counter(name: str) -> float:
        """A counter of vLLM's, or ours summed over its labels."""
        samples = [s for family in prometheus_client.REGISTRY.collect() for s in family.samples if s.name == name]
        return sum(sample.value for sample in samples)

    # ---- prefix hits against misses
    miss = bytes_of_prompt(PROMPT)
    whole_hit = bytes_of_prompt(PROMPT)
    llm.reset_prefix_cache()
    bytes_of_prompt(PROMPT[:128] + OTHER[:64])
    part_hit = bytes_of_prompt(PROMPT)  # 128 tokens are found; the rest is computed in the pieces of the miss
    llm.reset_prefix_cache()
    bytes_of_prompt(PROMPT[:96] + OTHER[:77])
    other_pieces = bytes_of_prompt(PROMPT)
    result: dict[str, Any] = {
        "whole_hit_equal": torch.equal(whole_hit, miss),
        "part_hit_equal": torch.equal(part_hit, miss),
        "other_pieces_equal": torch.equal(other_pieces, miss),
        "matrix_products_do_not_depend_on_the_batch": all(llm.apply_model(_has_invariant_products)),
        "hits": cached_tokens[:6],
        "other_prompt_differs": not torch.equal(bytes_of_prompt(OTHER), miss),
    }

    # ---- a NaN in one request's K
    llm.reset_prefix_cache()
    prompts = [PROMPT[:50], OTHER[:60], OTHER[60:100]]
    clean = generate(prompts, 40)
    appended, append = 0, ops.Pages.append

    def poisoned(self: ops.Pages, k: torch.Tensor, *more: torch.Tensor | None) -> None:
        nonlocal appended
        appended += 1
        # The first layer in a step in which all three decode; the first row is the first request's.
        if appended == 10 * len(impls) + 1:
            k = k.clone()
            k[0, 0, 0] = float("nan")
        append(self, k, *more)

    non_finite = counter("sawkv_non_finite_rows_total")
    llm.reset_prefix_cache()
    ops.Pages.append = poisoned  # type: ignore[method-assign]
    dirty = generate(prompts, 40)
    ops.Pages.append = append  # type: ignore[method-assign]
    llm.reset_prefix_cache()
    again = generate(prompts, 40)
    result |= {
        "equal_to_clean_beside_a_nan": [a == b for a, b in zip(dirty, clean, strict=True)],
        "equal_to_clean_after_it": again == clean,
        "non_finite_rows": counter("sawkv_non_finite_rows_total") - non_finite,
    }

    # ---- tokens counted
    result["tokens_appended"] = appended_tokens
    generate([PROMPT[:1]], 2)  # its second step publishes what was counted before the first
    result["tokens_counted"] = counter("sawkv_tokens_total")
    result["rows_counted"] = counter("sawkv_rows_total")
    result["saved_bytes"] = counter("sawkv_saved_bytes_total")
    result["preemptions"] = counter("vllm:num_preemptions_total")
    print(f"\n{MARK}{json.dumps(result)}")


def _has_invariant_products(model: Any) -> bool:
    """Whether the model's linear layers, as this CPU runs them, give a row the same bytes whatever rows
    are beside it.
    """
    import torch
    from vllm.model_executor.layers.linear import LinearBase

    layers = [module for module in model.modules() if isinstance(module, LinearBase)]
    assert layers
    for layer in layers:
        x = torch.randn(CHUNK, layer.input_size, dtype=torch.bfloat16)
        whole = layer.quant_method.apply(layer, x)
        # The pieces of the two runs.
        if not all(torch.equal(layer.quant_method.apply(layer, x[:n]), whole[:n]) for n in (8, 40)):
            return False
    return True


if __name__ == "__main__":
    main()
