"""sawkv inside unmodified vLLM, found by vLLM through the entry point group `vllm.general_plugins`.

`--kv-cache-dtype int4_per_token_head` then means sawkv's rotated INT4 pages; `docs/vllm.md` has the options.
Reading order: `config` (what the user asked for), `selection` (which layers are ours), `backend` (the attention
backend), `refusals` (what is not served), `windows` (the page size of windowed layers on vLLM before 0.28), `contract`
(what we need of vLLM), `server` (vLLM's server as a child process).
"""

from __future__ import annotations

PLUGIN = "sawkv"
"""The entry point's name, by which `VLLM_PLUGINS` lists it."""


def register() -> None:
    """Entry point: vLLM calls it in the front end, the engine core and every worker, perhaps more than once.

    It makes `--attention-backend CUSTOM` a valid choice, and has `selection` asked for each layer. Checks that must
    stop a start live there and in the classes. An exception here would stop engines that do not use sawkv too, so a
    vLLM that has changed is an error in its log.
    """
    from vllm.logger import init_logger

    from sawkv.errors import UnsupportedError
    from sawkv.integrations.vllm import prepare, selection

    for part in (selection, prepare):
        try:
            part.install()
        except UnsupportedError as error:
            init_logger("vllm.sawkv").error("%s. No layer is sawkv's in this process", error)
