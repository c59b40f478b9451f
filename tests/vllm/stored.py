"""One engine whose pages go to files and come back, in a process of its own (`engine.run_process`)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tests.conftest import MODEL

BLOCK = 32
PROMPTS = [[20 + i * step % 1000 for i in range(200)] for step in (7919, 104729)]


def generate(
    folder: str,
    entry: dict[str, Any],
    damage: int | None = None,
    claims: str | None = None,
    ranks: int = 1,
    model: str = "",
    other_weights: str = "",
) -> dict[str, Any]:
    """Generate for `PROMPTS`, one after the other.

    Args:
        folder: of the file tier.
        entry: `sawkv` of --additional-config.
        damage: byte of one stored file of the second prompt that is flipped before it.
        claims: fingerprint to take in place of its own.
        ranks: of tensor parallelism.
        model: folder of another model than the tests' own.
        other_weights: folder of a checkpoint that is loaded at the end, after the engine's own has been loaded again.
    """
    from vllm import LLM, SamplingParams

    from sawkv.integrations.vllm import disk

    if claims is not None:
        disk.fingerprint = lambda _: claims
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    llm = LLM(
        model or str(MODEL),
        skip_tokenizer_init=bool(model),
        kv_cache_dtype="int4_per_token_head",
        additional_config={"sawkv": entry},
        enforce_eager=True,
        max_model_len=512,
        block_size=BLOCK,
        tensor_parallel_size=ranks,
        kv_cache_memory_bytes=16 << 20,
        disable_log_stats=False,
        kv_transfer_config={
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "spec_name": "HostTieringSpec",
                "cpu_bytes_to_use": 64 << 20,
                "secondary_tiers": [
                    {"type": "sawkv_fs", "root_dir": folder, "n_read_threads": 1, "n_write_threads": 1}
                ],
            },
        },
    )
    core = llm.llm_engine.engine_core.engine_core
    (tier,) = llm.llm_engine.vllm_config.kv_transfer_config.kv_connector_extra_config["secondary_tiers"]
    pool = core.scheduler.kv_cache_manager.block_pool

    def digests() -> dict[str, list[str]]:
        """Of all layers' pages of each block in the prefix cache, on each rank, by the block's hash."""
        blocks = {}
        for key, value in pool.cached_block_hash_to_block._cache.items():
            one = next(iter(value.values())) if isinstance(value, dict) else value
            blocks[bytes(key).hex()] = one.block_id
        ranks = llm.collective_rpc(page_digests, args=(list(blocks.values()),))
        return {key: list(found) for key, *found in zip(blocks, *ranks, strict=True)}

    texts, cached = [], []
    for i, prompt in enumerate(PROMPTS):
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        texts.append(list(output.outputs[0].token_ids))
        cached.append(output.num_cached_tokens)
        if i == 0:
            first = digests()
            if damage is not None:
                flip(folder, set(first), damage)
    pages = digests()
    for _ in range(3):  # stores are queued, and seen to have ended, in the steps of later requests
        llm.generate(
            [{"prompt_token_ids": [30]}],
            SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
    reloaded = reload(llm, other_weights) if other_weights else {}
    region = Path(f"/dev/shm/vllm_offload_{llm.llm_engine.vllm_config.kv_transfer_config.engine_id}.mmap")
    llm.llm_engine.engine_core.shutdown()
    region.unlink(missing_ok=True)  # where a worker was stopped before it could
    metrics = {m.name.removeprefix("vllm:"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return {
        "fingerprint": disk.fingerprint(tier["written_with"]),
        "texts": texts,
        "cached": cached,
        "pages": pages,
        "metrics": metrics,
        "reloaded": reloaded,
        "files": sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.bin")),
    }


def reload(llm: Any, other_weights: str) -> dict[str, Any]:
    """What a prompt that no store has answers before and after the weights are loaded again, and what all pages are
    written with; then what loading others says.
    """
    from vllm import SamplingParams

    from sawkv.errors import UnsupportedError
    from sawkv.integrations.vllm.offload import describe

    def ask(salt: str) -> list[int]:
        prompt = {"prompt_token_ids": PROMPTS[0], "cache_salt": salt}
        sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([prompt], sampling, use_tqdm=False)
        return [*output.outputs[0].token_ids, output.num_cached_tokens]

    before = [ask("before"), llm.collective_rpc(describe)]
    llm.collective_rpc("reload_weights")
    after = [ask("after"), llm.collective_rpc(describe)]
    print("] sawkv: now other weights")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": other_weights})
    error = ""
    try:
        ask("others")
    except UnsupportedError as refusal:
        error = str(refusal)
    return {"before": before, "after": after, "error": error}


def page_digests(worker: Any, blocks: list[int]) -> list[str]:
    """Of each block's pages in all layers of a worker."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    pages = [[layer.kv_cache[block].contiguous().view(-1).numpy().tobytes() for layer in layers] for block in blocks]
    return [hashlib.sha256(b"".join(each)).hexdigest() for each in pages]


def flip(folder: str, known: set[str], place: int) -> None:
    """Flip one bit of the first block's file among those that are not `known`."""
    path = sorted(path for path in Path(folder).rglob("*.bin") if not any(path.stem in key for key in known))[0]
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
