"""vLLM's own plan of a KV cache, by its own functions, without an engine: `python -m tests.capacity.vllm_blocks < jobs
> results`.

The model is made on the meta device, so the shapes may be as large as the real ones. CUDA's sizes of blocks are given
by the caller.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any


def blocks(
    model: str,
    kv_cache_dtype: str,
    block_size: int,
    context: int,
    batched_tokens: int,
    kv_bytes: int,
    prefix_caching: bool = True,
    options: dict[str, Any] | None = None,
    stages: int = 1,
) -> dict[str, Any]:
    """What vLLM makes of `kv_bytes`. `options`: more of vLLM's; `stages`: of a pipeline, each with so many
    bytes.

    Returns:
        `tokens` that it would report, `num_blocks`, `block_size`, `least_prefix_hit`, `weights` (bytes of all
        parameters) and
        `state_bytes` (of a recurrent state, by the number of cards).
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.config.vllm import get_layers_from_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models import ModelRegistry, registry
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import MambaSpec
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    registry._run_in_subprocess = lambda inspect: inspect()  # a process for each kind of model would take a minute
    config = EngineArgs(
        model=model,
        load_format="dummy",
        kv_cache_dtype=kv_cache_dtype,
        block_size=block_size,
        max_model_len=context,
        max_num_batched_tokens=batched_tokens,
        enable_prefix_caching=prefix_caching,
        skip_tokenizer_init=True,
        enforce_eager=True,
        **(options or {}),
    ).create_engine_config()
    config.scheduler_config.async_scheduling = True  # as on a GPU
    with set_current_vllm_config(config):
        parallel_state.destroy_model_parallel()
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{os.environ['RENDEZVOUS']}", 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(config.model_config.dtype)
        with torch.device("meta"):
            made = initialize_model(config)
        torch.set_default_dtype(torch.float32)
        current_platform.update_block_size_for_backend(config)
        specs = GPUModelRunner.get_kv_cache_spec(SimpleNamespace(vllm_config=config, shared_kv_cache_layers={}))
        if config.speculative_config is not None:  # its own layer of attention, which vLLM would make with the drafter
            last = [name for name, layer in specs.items() if not isinstance(layer, MambaSpec)][-1]
            specs[f"mtp.{last}"] = specs[last]
        backends = {
            layer.get_attn_backend() for layer in get_layers_from_vllm_config(config, AttentionLayerBase).values()
        }
        resolve_kv_cache_layout(
            config, [[layout.name for layout in get_supported_kv_cache_layouts(backends)]], specs.values()
        )
        cache = plan(config, specs, kv_bytes, stages)
        states = {}
        for ranks in (1, 2, 4) if config.model_config.is_hybrid else ():
            config.parallel_config.tensor_parallel_size = ranks
            cls, _ = ModelRegistry.resolve_model_cls(config.model_config.architecture, model_config=config.model_config)
            shapes, dtypes = (
                cls.get_mamba_state_shape_from_config(config),
                cls.get_mamba_state_dtype_from_config(config),
            )
            states[str(ranks)] = MambaSpec(block_size=16, shapes=shapes, dtypes=dtypes).page_size_bytes
        config.parallel_config.tensor_parallel_size = 1
        return {
            "tokens": kv_cache_utils.get_kv_cache_capacity(config, cache)[0],
            "num_blocks": cache.num_blocks,
            "block_size": config.cache_config.block_size,
            "least_prefix_hit": kv_cache_utils.resolve_kv_cache_block_sizes(cache, config)[0],
            "weights": sum(parameter.numel() * parameter.element_size() for parameter in made.parameters()),
            "state_bytes": states,
        }


def plan(config: Any, specs: Any, kv_bytes: int, stages: int) -> Any:
    """vLLM's KVCacheConfig for the first of a pipeline's workers."""
    from vllm.distributed.utils import get_pp_indices
    from vllm.model_executor.models.utils import extract_layer_index

    ends = [get_pp_indices(config.model_config.hf_text_config.num_hidden_layers, i, stages) for i in range(stages)]
    workers = [specs]
    if stages > 1:  # Falcon-H1 and Zamba2, which have more names than layers, are asked about one stage alone
        workers = [{name: spec for name, spec in specs.items() if a <= extract_layer_index(name) < b} for a, b in ends]
    if find_spec("vllm.v1.core.kv_cache_planning") is None:  # before 0.33
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        return get_kv_cache_configs(config, workers, [kv_bytes] * stages)[0]
    planning: Any = import_module("vllm.v1.core.kv_cache_planning")
    groups = planning.get_global_kv_cache_groups(config, workers)
    return planning.get_kv_cache_configs(config, workers, [kv_bytes] * stages, groups)[0]


def main() -> None:
    results = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for job in json.load(sys.stdin):
            results.write(json.dumps(blocks(**job)) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
