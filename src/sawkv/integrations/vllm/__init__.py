"""sawkv inside unmodified vLLM, which finds it by the entry point group `vllm.general_plugins`.

With it, `--kv-cache-dtype sawkv_int4`, before vLLM 0.33 `int4_per_token_head`, means sawkv's rotated INT4 pages.
docs/vllm.md lists the options. Reading order: `config` (the user's settings), `dtypes` (our names), `selection` (which
layers use sawkv), `backend` (the attention backend), `recent` (the newest tokens in 16 bits), `prefill`, `prepare` and
`measure` (preparation at start), `warm_up` (kernels compiled at start), `connectors`, `offload`, `disk` and `host`
(pages that leave the engine), `weights` (other weights in a running engine), `refusals` (what is not served), `windows`
(page sizes of windowed layers before vLLM 0.28), `contract` (what sawkv needs of vLLM), `server` (vLLM's server as a
child process), `client`.
"""

from __future__ import annotations

PLUGIN = "sawkv"
"""Name of the entry point, as in `VLLM_PLUGINS`."""


def register() -> None:
    """Entry point. vLLM calls it in the front end, the engine core and every worker, and may call it more than once.

    It registers `--attention-backend CUSTOM` and the names in `dtypes`, and installs `selection`, which vLLM asks for
    each layer. Checks that stop a start are made there and in the classes. An exception here would also stop engines
    that do not use sawkv, so a vLLM that has changed is logged as an error.
    """
    from vllm.logger import init_logger

    from sawkv.errors import UnsupportedError
    from sawkv.integrations.vllm import dtypes, offload, prepare, selection

    dtypes.install()
    offload.install()
    for part in (selection, prepare):
        try:
            part.install()
        except UnsupportedError as error:
            init_logger("vllm.sawkv").error("%s. No layer is sawkv's in this process", error)
