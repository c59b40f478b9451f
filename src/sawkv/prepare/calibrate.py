"""`sawkv prepare`: fits a calibration with Transformers, once, and writes it to a file that travels with the model.

Engines do the same when they start, by the same `statistics` and `fit`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from sawkv.errors import FormatError, SawkvError, UnsupportedError
from sawkv.files import check_writable
from sawkv.format.spec import CacheFormat
from sawkv.prepare.calibration import Calibration, model_id
from sawkv.prepare.corpus import LONGEST_CONTEXT, preparation_windows
from sawkv.prepare.fit import fit
from sawkv.prepare.model import EvalModel, default_dtype, find_device, measure
from sawkv.prepare.store import SHIPPED, contents_digest, shipped_path
from sawkv.prepare.text import load_text, shipped_text, with_bos


def run_prepare(
    model_folder: Path,
    text_file: Path | None,
    out: Path | None,
    *,
    cache_format: CacheFormat,
    context: int,
    window: int,
    windows: int,
    device: str | None,
) -> int:
    """Measure the model, fit a calibration and write its file.

    Args:
        model_folder: a checkpoint directory.
        text_file: UTF-8 text; None is the text that ships with sawkv, which engines use when they start.
        out: the file to write; None is the place where engines look for it (`store.shipped_path`).
        cache_format: the format that will be served.
        context: tokens of the longest request that will be served; 0 is the model's limit, at most `LONGEST_CONTEXT`.
        window: tokens per window. Each window is read from an empty cache, at positions spread over the context.
        windows: number of windows.
        device: `cpu` or `cuda`; None takes a GPU if there is one.

    Returns:
        0.

    Raises:
        SawkvError: bad input. The message names it.
    """
    ships = out is None
    if ships and not model_folder.is_dir():
        raise SawkvError(f"prepare: expected a checkpoint directory to write into, or --out FILE, got {model_folder}")
    if not cache_format.quantized:
        raise FormatError(
            f"prepare: expected a quantized format such as int4, got {cache_format}, for which there is nothing to fit"
        )
    check_writable(out or model_folder / SHIPPED / "probe")
    text = shipped_text(model_folder) if text_file is None else load_text(model_folder, text_file)
    where = find_device(device)
    model = EvalModel.load(model_folder, where, default_dtype(where))
    text = with_bos(text, model)
    weights = contents_digest(model_folder)
    limit = getattr(model.model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_CONTEXT
    context = context or min(limit, LONGEST_CONTEXT)
    window = min(window, context)
    if text_file is None:
        ids = preparation_windows(text.encode, window, windows, text.prefix)
    else:
        _, ids = text.split(window, 1, windows)  # taken from the end, because `sawkv eval` scores the start
    shape = model.shape
    heads = f"{shape.num_layers} layers, {shape.num_kv_heads} KV heads of {shape.head_dim}"
    print(f"model   {model_folder.resolve().name}: {heads}")
    print(f"text    {text.name}: {len(ids)} windows of {window:,} tokens, at positions up to {context:,}")
    started = time.monotonic()
    calibration = replace(calibrate(model, cache_format, ids, context), weights=weights or "")
    path = out or shipped_path(model_folder, calibration.format)
    calibration.save(path)
    print(f"format  {calibration.format}, fitted in {time.monotonic() - started:.1f} s")
    print(f"wrote   {path}, {path.stat().st_size:,} bytes, fingerprint {calibration.fingerprint()}")
    if ships:
        print(f"Whoever serves {model_folder} finds it there, for as long as its weights are the same.")
    else:
        print(f"to use it: sawkv serve {model_folder} --calibration {path}")
    return 0


def calibrate(model: EvalModel, cache_format: CacheFormat, windows: torch.Tensor, context: int) -> Calibration:
    """Fit the calibration of all layers.

    Args:
        model: the model, with the hooks of `EvalModel`.
        cache_format: a quantized format.
        windows: [num_windows, window] token ids.
        context: tokens over which the windows are spread.

    Raises:
        FormatError: the format does not quantize, or does not fit the model.
        UnsupportedError: layers differ in shape, or their K or V is not finite.
    """
    num_kv_heads, head_dim = model.shape.num_kv_heads, model.shape.head_dim
    resolved = cache_format.resolve(head_dim)
    with tqdm(total=len(windows), desc="measuring", unit="window", leave=False, disable=None) as bar:
        statistics = measure(model, windows, context, lambda states: bar.update())
    for index, layer in enumerate(statistics):
        if (layer.num_kv_heads, layer.head_dim) != (num_kv_heads, head_dim):
            raise UnsupportedError(
                f"prepare: expected every layer to have {num_kv_heads} KV heads of {head_dim}, "
                f"got {layer.num_kv_heads} of {layer.head_dim} in layer {index}. Engines prepare such a model when they"
                " start"
            )
    config = model.model.config.get_text_config()
    # In a hybrid model some layers have no attention.
    indices = [getattr(module, "layer_idx", position) for position, module in enumerate(model.layers)]
    return Calibration.from_layers(
        resolved, model_id(config), config.num_hidden_layers, dict(zip(indices, fit(statistics, resolved), strict=True))
    )
