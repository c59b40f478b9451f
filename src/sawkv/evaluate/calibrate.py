"""`sawkv calibrate`: the static centers of K and V that lower the codec's error, measured on text and judged on other text.

The center is the mean of the head's rows. The median, the middle of the range before or after rotation, and centers fitted to the codec's
range by gradient were tried beside it and are not better (docs/calibration.md). A layer's K or V is left as it is where the mean does not
lower its error on the text it is judged on.

Keys turn with their position, so their mean is that of a context's length: centers measured at positions 0 to 255 make 4,096 tokens worse,
not better. The windows of text are therefore placed at positions spread over the context that is to be served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sawkv.calibration import Calibration, model_id
from sawkv.errors import FormatError, SawkvError, UnsupportedError
from sawkv.evaluate.run import default_device, default_dtype
from sawkv.evaluate.text import load_text
from sawkv.integrations.transformers_eval import EvalModel
from sawkv.methods import CODECS
from sawkv.rotation import rotate
from sawkv.spec import CacheFormat

JUDGED_SHARE = 4
"""One window of this many is kept to judge the centers on."""


@dataclass(frozen=True)
class Saving:
    """What centering does to the rows of K or V in one layer: squared error as a share of their variance, without and with it."""

    plain: float
    centered: float

    @property
    def used(self) -> bool:
        """Whether the center lowers the error; if not it is left out."""
        return self.centered < self.plain


def run_calibrate(
    model_folder: Path,
    text_file: Path | None,
    out: Path,
    *,
    cache_format: str,
    context: int,
    window: int,
    windows: int,
    device: str | None,
) -> int:
    """Measure, write `out`, and print what it saves. Returns 0.

    Args:
        model_folder: a checkpoint directory.
        text_file: UTF-8 text; None is the model's own held-out text.
        out: the file to write.
        cache_format: name of the format that will be served.
        context: tokens of the sequences that will be served.
        window: tokens read from an empty cache at a time, at positions somewhere in that context.
        windows: how many, a quarter of them to judge the centers on.
        device: None is a GPU where there is one.

    Raises:
        SawkvError: bad input, by name.
    """
    wanted = CacheFormat.parse(cache_format)
    window = min(window, context)
    text = load_text(model_folder, text_file)
    for_judging = max(1, windows // JUDGED_SHARE)
    judged, fitted = text.split(window, for_judging, max(1, windows - for_judging))  # from the end, as `sawkv eval` calibrates
    where = torch.device(device) if device else default_device()
    model = EvalModel.load(model_folder, where, default_dtype(where))
    print(f"model   {model_folder.resolve().name}: {len(model.layers)} layers, {model.shape[1]} KV heads of {model.shape[2]}")
    print(f"text    {text.name}: {len(fitted)} windows of {window:,} tokens to measure, {len(judged)} others to judge")
    print(f"context {context:,} tokens, over which the windows are spread")
    calibration, savings = calibrate(model, wanted, fitted, judged, context)
    calibration.save(out)
    print(f"format  {calibration.format}\n")
    _print(savings)
    print(f"\nwrote {out}, {out.stat().st_size:,} bytes, fingerprint {calibration.fingerprint()}")
    print(f"to use it: sawkv serve {model_folder} --calibration {out}")
    return 0


def calibrate(
    model: EvalModel, cache_format: CacheFormat, fitted: torch.Tensor, judged: torch.Tensor, context: int
) -> tuple[Calibration, list[tuple[Saving, Saving]]]:
    """Centers of all layers, and what they save of K and of V in each.

    Args:
        model: its attention is as `EvalModel` needs it.
        cache_format: a quantized one.
        fitted, judged: [num_windows, window] token ids.
        context: tokens over which these windows are spread, at least `window`.

    Raises:
        FormatError: the format does not quantize, or does not fit the model.
        UnsupportedError: the layers differ in shape.
    """
    _, num_kv_heads, head_dim = model.shape
    resolved = cache_format.resolve(head_dim)
    if not resolved.quantized:
        raise FormatError(f"calibrate: expected a quantized format such as int4-k128-v128, got {resolved}, which centers do not improve")
    shape = (len(model.layers), 2, num_kv_heads, head_dim)
    total = torch.zeros(shape, dtype=torch.float64, device=model.device)
    for rows in _rows(model, fitted, context, "measuring"):
        for layer, pair in enumerate(rows):
            for kind, x in enumerate(pair):
                if x.shape[1:] != shape[2:]:
                    raise UnsupportedError(
                        f"calibrate: expected every layer to have {num_kv_heads} KV heads of {head_dim}, "
                        f"got {list(x.shape[1:])} in layer {layer}"
                    )
                total[layer, kind] += x.sum(0, dtype=torch.float64)
    centers = (total / fitted.numel()).float()
    if not bool(centers.isfinite().all()):
        raise SawkvError("calibrate: expected finite K and V, got NaN or infinity")
    orders = (resolved.k_rotation_order or 0, resolved.v_rotation_order or 0)
    found = torch.zeros(*shape[:2], 2, dtype=torch.float64, device=model.device)  # squared error, plain and centered
    sums = torch.zeros(2, *shape, dtype=torch.float64, device=model.device)  # of rows and of their squares
    for rows in _rows(model, judged, context, "judging"):
        for layer, pair in enumerate(rows):
            for kind, x in enumerate(pair):
                found[layer, kind, 0] += _squared_error(x, resolved.codec, orders[kind])
                found[layer, kind, 1] += _squared_error(x - centers[layer, kind], resolved.codec, orders[kind])
                sums[0, layer, kind] += x.sum(0, dtype=torch.float64)
                sums[1, layer, kind] += x.double().square().sum(0)
    variance = (sums[1] - sums[0].square() / judged.numel()).sum((-1, -2)).clamp_min(torch.finfo(torch.float64).tiny)
    shares = (found / variance[..., None]).tolist()
    savings = [(Saving(*k), Saving(*v)) for k, v in shares]
    config = model.model.config.get_text_config()
    chosen = torch.zeros(2, config.num_hidden_layers, num_kv_heads, head_dim)
    for position, module in enumerate(model.layers):
        index = getattr(module, "layer_idx", position)  # not every layer of a hybrid model attends
        for kind, saving in enumerate(savings[position]):
            if saving.used:
                chosen[kind, index] = centers[position, kind].cpu()
    return Calibration(resolved, model_id(config), chosen[0], chosen[1]), savings


def _rows(model: EvalModel, windows: torch.Tensor, context: int, what: str) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """K and V of all layers, one window at a time, [num_tokens, num_kv_heads, head_dim] fp32."""
    firsts = torch.linspace(0, context - windows.shape[1], len(windows)).long().tolist() if len(windows) > 1 else [0]
    pairs = zip(torch.split(windows, 1), firsts, strict=True)
    for ids, first in tqdm(pairs, total=len(firsts), desc=what, unit="window", leave=False, disable=None):
        yield [(states.k, states.v) for states in model.states(ids, first)]


def _squared_error(x: torch.Tensor, codec: str, order: int) -> torch.Tensor:
    """Sum of the codec's squared errors; a rotation does not change it."""
    y = rotate(x, order)
    return (CODECS[codec].decode(*CODECS[codec].encode(y)) - y).square().sum(dtype=torch.float64)


def _print(savings: list[tuple[Saving, Saving]]) -> None:
    print("squared error, % of variance    K   plain   centered            V   plain   centered")
    rows = [(f"layer {layer}", pair) for layer, pair in enumerate(savings)]
    mean = tuple(
        Saving(sum(s.plain for s in column) / len(column), sum(min(s.plain, s.centered) for s in column) / len(column))
        for column in zip(*savings, strict=True)
    )
    for name, (k, v) in [*rows, ("all, with what is used", mean)]:
        print(f"{name:<28}{_cells(k)}    {_cells(v)}")


def _cells(saving: Saving) -> str:
    change = saving.centered / saving.plain - 1 if saving.plain else 0.0
    return f"{100 * saving.plain:>11.3f}{100 * saving.centered:>11.3f}  {change:>+5.0%}{' ' if saving.used else '-'}"
