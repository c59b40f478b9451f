"""`sawkv prepare`: fits a calibration with Transformers, once, and writes it to a file that travels with the model.

Engines do the same when they start, by the same `statistics` and `fit`.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from sawkv.checkpoint import WEIGHT_SUFFIXES
from sawkv.errors import FormatError, SawkvError, UnsupportedError
from sawkv.files import check_writable
from sawkv.format.spec import CacheFormat
from sawkv.prepare.calibration import Calibration, model_id
from sawkv.prepare.corpus import LONGEST_CONTEXT, context_of, preparation_windows
from sawkv.prepare.fit import fit
from sawkv.prepare.model import EvalModel, default_dtype, find_device, kv_sources, measure
from sawkv.prepare.statistics import LayerStatistics
from sawkv.prepare.store import SHIPPED, contents_digest, expectations, shipped_paths
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
        out: the file to write, which holds layers of one shape; None is the place where engines look (one file for each
            shape of layers, `store.shipped_paths`).
        cache_format: the format that will be served.
        context: tokens of the longest request that will be served; 0 is the model's limit.
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
    if (
        out is not None
        and out.suffix in WEIGHT_SUFFIXES
        and model_folder.resolve() in (out.resolve(), out.resolve().parent)
    ):
        raise SawkvError(
            f"--out: expected a file outside of {model_folder}, where engines read such files as weights, got {out}."
            f" Without --out it goes to {model_folder / SHIPPED}, where they find it"
        )
    check_writable(out or model_folder / SHIPPED / "probe")
    text = shipped_text(model_folder) if text_file is None else load_text(model_folder, text_file)
    if text_file is None and (asked := window * windows) > len(text.ids):
        option = "tokens" if windows > 1 else "window"
        raise SawkvError(f"--{option}: expected at most {len(text.ids)}, those of {text.name}, got {asked}")
    where = find_device(device)
    model = EvalModel.load(model_folder, where, default_dtype(where))
    shapes = Counter(model.heads)
    heads = " and ".join(f"{count} layers, {kv} KV heads of {dim}" for (kv, dim), count in sorted(shapes.items()))
    if out is not None and len(shapes) > 1:
        raise UnsupportedError(
            f"--out: expected a model whose layers have heads of one shape, got {heads}. Without --out, `sawkv prepare`"
            " writes a file for each shape into the model's folder"
        )
    model.check_positions("--context", context)
    text = with_bos(text, model)
    weights = contents_digest(model_folder)
    context = context or context_of(model.model.config.get_text_config())
    window = min(window, context)
    if text_file is None:
        ids = preparation_windows(text.encode, window, windows, text.prefix)
    else:
        _, ids = text.split(window, 1, windows)  # taken from the end, because `sawkv eval` scores the start
    spread = min(context, LONGEST_CONTEXT)
    print(f"model   {model_folder.resolve().name}: {heads}")
    print(f"text    {text.name}: {len(ids)} windows of {window:,} tokens, at positions up to {spread:,}")
    started = time.monotonic()
    calibrations = [replace(part, weights=weights or "") for part in calibrate(model, cache_format, ids, context)]
    formats = dict.fromkeys(str(part.format) for part in calibrations)
    print(f"format  {' and '.join(formats)}, fitted in {time.monotonic() - started:.1f} s")
    config, made = model.model.config.get_text_config(), [(each.num_kv_heads, each.head_dim) for each in calibrations]
    expected = expectations(cache_format, config, made)
    paths = shipped_paths(model_folder, expected) if out is None else [out]
    for path, calibration in zip(paths, calibrations, strict=True):
        calibration.save(path)
        print(f"wrote   {path}, {path.stat().st_size:,} bytes, fingerprint {calibration.fingerprint()}")
    # The file names its pages, which are those of `int4` for `int4-r64` too.
    named = f" --format {cache_format}" if cache_format.recent or (ships and str(cache_format) != "int4") else ""
    if ships:
        print(f"Whoever serves {model_folder}{named} finds it there, for as long as its weights are the same.")
    else:
        print(f"to use it: sawkv serve {model_folder}{named} --calibration {out}")
    return 0


def calibrate(model: EvalModel, cache_format: CacheFormat, windows: torch.Tensor, context: int) -> list[Calibration]:
    """Fit the calibrations of all layers that have K and V of their own, one for each shape of their heads, in order.

    Args:
        model: the model, with the hooks of `EvalModel`.
        cache_format: a quantized format.
        windows: [num_windows, window] token ids.
        context: tokens over which the windows are spread.

    Raises:
        FormatError: the format does not quantize, or does not fit the model.
        UnsupportedError: K or V of a layer is not finite.
    """
    config = model.model.config.get_text_config()
    for head_dim in sorted({head_dim for _, head_dim in model.heads}):
        cache_format.resolve(head_dim)  # before anything is measured
    # In a hybrid model some layers have no attention.
    indices = [getattr(module, "layer_idx", position) for position, module in enumerate(model.layers)]
    place, owner = {index: i for i, index in enumerate(indices)}, kv_sources(config)
    sources = [place[owner[index]] for index in indices]
    with tqdm(total=len(windows), desc="measuring", unit="window", leave=False, disable=None) as bar:
        statistics = measure(model, windows, context, lambda states: bar.update(), sources)
    by_shape: dict[tuple[int, int], dict[int, LayerStatistics]] = {}
    for i in sorted(set(sources)):
        by_shape.setdefault(model.heads[i], {})[indices[i]] = statistics[i]
    calibrations = []
    for (_, head_dim), layers in sorted(by_shape.items()):
        resolved = cache_format.resolve(head_dim)
        fitted = dict(zip(layers, fit(list(layers.values()), resolved), strict=True))
        calibrations.append(Calibration.from_layers(resolved, model_id(config), config.num_hidden_layers, fitted))
    return calibrations
