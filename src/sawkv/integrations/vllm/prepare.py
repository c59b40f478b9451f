"""Prepares the loaded model before it serves. The engine core conducts it, and workers do it (`measure`).

Prompts of the text that ships with sawkv pass through the engine's own scheduler and workers, one at a time. So the
model computes as it will when it serves, with recurrent layers, pipeline stages, ranks, quantized weights, compiled or
not.

vLLM has no hook in the engine core between the allocation of caches and the report that the engine is ready. So
`EngineCore._initialize_kv_caches` is replaced by a method that prepares afterwards. `contract` stops the start of an
engine without this method.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.logger import init_logger

from sawkv.errors import SawkvError, UnsupportedError
from sawkv.integrations.vllm import announce, offload, warm_up
from sawkv.integrations.vllm.config import SawConfig
from sawkv.prepare import corpus
from sawkv.prepare.calibration import Calibration
from sawkv.prepare.store import (
    CalibrationStore,
    contents_digest,
    expectations,
    listed,
    load_shipped,
    make_key,
    shipped_paths,
)
from sawkv.prepare.turning import bucketed_context, buckets_in

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from sawkv.integrations.vllm.measure import HeadShape

LEAST_WINDOW: Final = 16
FILE_FORMATS: Final = (
    "auto",
    "hf",
    "safetensors",
    "fastsafetensors",
    "pt",
    "npcache",
    "mistral",
    "gguf",
    "bitsandbytes",
)
"""Of vLLM's --load-format, those that load a checkpoint's files from the folder that --model names, or from the hub's
cache.
"""

logger = init_logger(f"vllm.{__name__}")


def install() -> None:
    """Make every engine core of this process prepare its model. May be called again.

    Raises:
        UnsupportedError: this vLLM lacks the method.
    """
    from vllm.v1.engine.core import EngineCore

    if is_installed():
        return
    initialize = getattr(EngineCore, "_initialize_kv_caches", None)
    if initialize is None:
        raise UnsupportedError(
            "sawkv does not fit this vLLM: it needs vllm.v1.engine.core.EngineCore._initialize_kv_caches"
        )

    @functools.wraps(initialize)
    def initialize_and_prepare(self: Any, vllm_config: VllmConfig) -> KVCacheConfig:
        config = SawConfig.from_vllm(vllm_config, vllm_config.cache_config.cache_dtype)
        if config is not None:
            self.model_executor.collective_rpc(announce.say_layers)
            self.model_executor.collective_rpc(warm_up.arrange)
        kv_cache_config: KVCacheConfig = initialize(self, vllm_config)
        if config is not None:
            announce.say_states(vllm_config, kv_cache_config)
            if config.prepares:
                prepare(self.model_executor, vllm_config, kv_cache_config, config)
        offload.bind(self.model_executor, vllm_config)
        if config is not None:
            from sawkv.integrations.vllm.metrics import publish_when_idle
            from sawkv.integrations.vllm.weights import watch

            self.model_executor.collective_rpc(publish_when_idle)
            self.model_executor.collective_rpc(watch)
        return kv_cache_config

    initialize_and_prepare.prepares = True  # type: ignore[attr-defined]
    EngineCore._initialize_kv_caches = initialize_and_prepare  # type: ignore[method-assign]


def is_installed() -> bool:
    from vllm.v1.engine.core import EngineCore

    return getattr(getattr(EngineCore, "_initialize_kv_caches", None), "prepares", False)


def prepare(executor: Any, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: SawConfig) -> None:
    """Prepare the layers that wait for it, if there are any.

    Raises:
        UnsupportedError: preparation failed, so nothing must be served.
    """
    try:
        _prepare(executor, vllm_config, kv_cache_config, config)
    except Exception as error:
        raise UnsupportedError(
            f"sawkv cannot prepare this model for {config.format}: {error}. Serve it with --format int8 or, unprepared,"
            ' with --no-prepare (in vLLM\'s own command line --kv-cache-dtype int8_per_token_head, and "prepare":'
            " false in the sawkv entry of --additional-config), or in 8 bits by vLLM itself with --kv-cache-dtype fp8"
            " alone"
        ) from error


def _prepare(executor: Any, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: SawConfig) -> None:
    # Imports the attention backend, which an engine core otherwise does without.
    from sawkv.integrations.vllm import measure

    if getattr(vllm_config.parallel_config, "enable_elastic_ep", False):
        raise UnsupportedError("expected engines that start together, got elastic expert parallelism")
    started = time.monotonic()
    shapes = set().union(*executor.collective_rpc(measure.waiting))
    if not shapes:
        return
    windows, positions = _windows(vllm_config)
    entry = _Entry(vllm_config, config, sorted(shapes), windows, positions)
    calibrations, source = entry.load()
    if all(executor.collective_rpc(measure.all_agree, args=(bool(calibrations),))):
        executor.collective_rpc(measure.apply, args=(calibrations,))
    else:
        logger.info("sawkv: preparing the model on %d windows of %d tokens", *windows.shape)
        engine = _Engine(executor, vllm_config, kv_cache_config)
        executor.collective_rpc(measure.begin)
        with offload.disconnected(executor, vllm_config):
            for each in corpus.passes(windows, positions, served_context(vllm_config)):
                executor.collective_rpc(measure.place, args=(each.positions, each.is_probe))
                engine.run(each.ids.tolist())
        calibrations = executor.collective_rpc(measure.finish)[0]
        source = f"on {len(windows)} windows of {windows.shape[1]} tokens, {entry.save(calibrations)}"
    fingerprints = ", ".join(calibration.fingerprint() for calibration in calibrations)
    logger.info("sawkv: prepared in %.1f s %s, fingerprint %s", time.monotonic() - started, source, fingerprints)


def served_context(vllm_config: VllmConfig) -> int:
    """Positions that get buckets (`prepare.turning`)."""
    model = vllm_config.model_config
    return bucketed_context(model.hf_text_config, model.max_model_len)


def _windows(vllm_config: VllmConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions of the windows, both [num_windows, window] int64."""
    model = vllm_config.model_config
    # One token is generated, which takes a place; a window has to be one step.
    window = min(corpus.WINDOW, model.max_model_len - 1, vllm_config.scheduler_config.max_num_batched_tokens)
    if vllm_config.device_config.device_type == "cpu" and vllm_config.cache_config.enable_prefix_caching:
        # vLLM's CPU kernel of Mamba2 gives one state a prompt. With prefix caching one for each chunk is asked for:
        # longer prompts fail.
        window = min(window, model.get_mamba_chunk_size() or window)
    if window < LEAST_WINDOW:
        raise UnsupportedError(
            f"expected --max-model-len and --max-num-batched-tokens above {LEAST_WINDOW}, got room for {window} tokens"
        )
    positions = corpus.preparation_positions(corpus.NUM_WINDOWS, window, model.max_model_len)
    encoder = _encoder(model)
    if encoder is not None:
        windows = corpus.preparation_windows(encoder[0], window, corpus.NUM_WINDOWS, encoder[1])
        if int(windows.max()) < model.get_vocab_size():
            return windows, positions
    logger.warning(
        "sawkv: the model is prepared on random tokens, which is worse: it has no tokenizer here, or not its own"
    )
    return corpus.random_windows(model.get_vocab_size(), window, corpus.NUM_WINDOWS), positions


def _encoder(model: ModelConfig) -> tuple[Any, list[int]] | None:
    """The encoder without special tokens, and the special tokens before a text; None with --skip-tokenizer-init."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model)
    if tokenizer is None:
        return None
    encode, whole = (functools.partial(tokenizer.encode, add_special_tokens=special) for special in (False, True))
    return encode, corpus.tokens_before(encode, whole)


class _Entry:
    """Stored calibrations of this model, in its folder or in the user's cache, or the reason why none can be stored.
    There is one for each shape of layers, and all or none are used.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: SawConfig,
        shapes: Sequence[HeadShape],
        windows: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        model, self._context = vllm_config.model_config, served_context(vllm_config)
        self._expected = expectations(config.format, model.hf_text_config, shapes)
        text = {
            "windows": list(windows.shape),
            "text": _digest(windows),
            "positions": _digest(positions),
            "buckets": buckets_in(self._context),
        }
        self._store: CalibrationStore | None = None
        self._checkpoint: Path | None = None
        self._weights: str | None = None
        self._reason, self._overridden = "", bool(model.hf_overrides)
        try:
            self._checkpoint = _checkpoint_path(vllm_config)
            self._weights = None if self._checkpoint is None else contents_digest(self._checkpoint)
            if self._weights is None:
                self._reason = (
                    f"the weights are not files of a checkpoint (--load-format {vllm_config.load_config.load_format})"
                )
                return
            measured = {**text, **computation(vllm_config), "weights": self._weights}
            self._entries = {make_key({**expected, **measured}): expected for expected in self._expected}
            self._store = CalibrationStore(config.prepare_cache, logger)
        except (SawkvError, OSError) as error:
            self._reason = str(error)

    def load(self) -> tuple[list[Calibration], str]:
        """The stored calibrations, or none, and where they were found."""
        shipped = self._load_shipped()
        if shipped and self._checkpoint is not None:
            return shipped, f"from {listed(shipped_paths(self._checkpoint, self._expected))}, which came with the model"
        if self._store is None:
            return [], ""
        return self._store.load_all(self._entries), f"from {listed(map(self._store.path, self._entries))}"

    def _load_shipped(self) -> list[Calibration]:
        if self._checkpoint is None or self._weights is None or not self._checkpoint.is_dir():
            return []
        found = load_shipped(self._checkpoint, self._weights, self._expected, log=logger)
        if found and self._overridden:
            logger.warning(
                "sawkv: the preparation that came with the model is not used: --hf-overrides changes what it was"
                " made for"
            )
            return []
        for part in found:
            announce.warn_short(part, self._context)
        return found

    def save(self, calibrations: Sequence[Calibration]) -> str:
        """Store the calibrations if possible, and say where, or why not."""
        if self._store is None:
            return f"not kept: {self._reason}"
        try:
            paths = [self._store.save(key, found) for key, found in zip(self._entries, calibrations, strict=True)]
        except SawkvError as error:
            return f"not kept: {error}"
        return f"kept in {listed(paths)}"


def _digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def _checkpoint_path(vllm_config: VllmConfig) -> Path | None:
    """Folder or file of the checkpoint that vLLM loaded; None if it loaded no files, or they are not found."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if str(load.load_format) not in FILE_FORMATS:
        return None
    path = Path(model.model)
    if not path.exists():
        from huggingface_hub import snapshot_download

        try:
            path = Path(
                snapshot_download(
                    model.model, revision=model.revision, cache_dir=load.download_dir, local_files_only=True
                )
            )
        except (OSError, ValueError):  # ValueError: not a name of the hub
            return None
    return path


def weights_digest(vllm_config: VllmConfig) -> str | None:
    """Digest of the checkpoint's weights; None if they are not files.

    Raises:
        OSError: a file cannot be read.
    """
    path = _checkpoint_path(vllm_config)
    return None if path is None else contents_digest(path)


def computation(vllm_config: VllmConfig) -> dict[str, Any]:
    """Settings that change the numbers that the model computes, by name. Ranks and batches change no more than
    rounding.
    """
    import vllm
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    config = model.hf_config.to_dict()  # with what --hf-overrides changed
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    skipped = sorted(vllm_config.cache_config.kv_cache_dtype_skip_layers)
    return {
        **({"skipped": skipped} if skipped else {}),  # what is kept then lacks these layers
        "config": config,
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "engine": f"vllm {vllm.__version__}",
        "device": f"{vllm_config.device_config.device_type} {current_platform.get_device_name()}",
    }


class _Engine:
    """Steps the workers through single prompts with a scheduler of its own."""

    def __init__(self, executor: Any, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
        from vllm.v1.structured_output import StructuredOutputManager

        config = copy.copy(vllm_config)
        config.kv_events_config = None  # whose port the engine's scheduler takes
        config.kv_transfer_config = None  # what is computed here must not be stored
        block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config, config)
        self._hasher = None
        if config.cache_config.enable_prefix_caching:  # a scheduler that caches wants hashes
            hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
            init_none_hash(hash_function)
            self._hasher = get_request_block_hasher(hash_block_size, hash_function)
        self._scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            hash_block_size=hash_block_size,
        )
        self._executor = executor
        self._pools = config.model_config.runner_type == "pooling"
        self._count = 0

    def run(self, prompt_token_ids: list[int]) -> None:
        """Run one prompt, from its first step to the step that tells workers that it has ended."""
        from vllm import PoolingParams, SamplingParams
        from vllm.v1.request import Request

        self._count += 1
        self._scheduler.add_request(
            Request(
                request_id=f"sawkv-prepare-{self._count}",
                prompt_token_ids=prompt_token_ids,
                sampling_params=(
                    None
                    if self._pools
                    else SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
                ),
                pooling_params=PoolingParams(task=self._executor.supported_tasks[0]) if self._pools else None,
                cache_salt=str(self._count),  # or windows that begin alike would hit each other's pages
                block_hasher=self._hasher,
            )
        )
        while self._scheduler.has_requests():
            scheduled = self._scheduler.schedule()
            output = self._executor.execute_model(scheduled)
            if output is None:
                output = self._executor.sample_tokens(None)
            self._scheduler.update_from_output(scheduled, output)
