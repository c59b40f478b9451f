"""sawkv inside unmodified vLLM, found by vLLM through the entry point group `vllm.general_plugins`.

`--kv-cache-dtype int4_per_token_head` then means sawkv's rotated INT4 pages; `docs/vllm.md` has the options.
Reading order: `config` (what the user asked for), `backend` (the attention backend), `cpu` (how vLLM's CPU platform reaches it),
`windows` (the page size of windowed layers on vLLM before 0.28), `contract` (what we need of vLLM).
"""

from __future__ import annotations

SAW_BACKEND = "sawkv.integrations.vllm.backend.SawAttentionBackend"
CPU_BACKEND = "sawkv.integrations.vllm.cpu.DispatchingCPUBackend"


def register() -> None:
    """Entry point: vLLM calls it in the front end, the engine core and every worker, perhaps more than once.

    It only names classes; vLLM imports them when it selects a backend. vLLM logs and swallows whatever is raised here, so
    checks that must stop a start live in the classes.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, SAW_BACKEND)
    # vLLM's CPU platform always selects CPU_ATTN, whatever the command line says: stand in for it, and pass on what is not ours.
    register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
    for name in ("CPU_MLA", "AMX_MLA"):
        if name in AttentionBackendEnum.__members__:  # vLLM before 0.28 has no MLA on the CPU, and says so itself
            register_backend(AttentionBackendEnum[name], f"sawkv.integrations.vllm.mla.{name}")
