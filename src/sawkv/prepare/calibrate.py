"""`sawkv calibrate`: static centers of K and V, and the feedback of their codes' errors, measured on text and judged on other text.

The center is the mean of the head's rows. The median, the middle of the range before or after rotation, and centers fitted to the codec's
range by gradient were tried beside it and are not better (docs/calibration.md). A layer's K or V is left as it is where the mean does not
lower its error on the text it is judged on.

Feedback (`format.feedback`, for int4 alone) is fitted to what an error costs: for K in scores, by the queries of the text, for V in the
layer's output, by o_proj. It raises the squared error and lowers that cost; where it does not, on the text judged on, it is left out.

Keys turn with their position, so their mean is that of a context's length: centers measured at positions 0 to 255 make 4,096 tokens worse,
not better. The windows of text are therefore placed at positions spread over the context that is to be served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sawkv.errors import FormatError, SawkvError, UnsupportedError
from sawkv.files import check_writable
from sawkv.format.codecs import CODECS
from sawkv.format.feedback import Feedback, fit_feedback
from sawkv.format.rotation import rotate
from sawkv.format.spec import CacheFormat
from sawkv.prepare.calibration import Calibration, model_id
from sawkv.prepare.corpus import preparation_positions
from sawkv.prepare.model import EvalModel, default_dtype, find_device
from sawkv.prepare.samples import LayerStates, key_hessian, value_hessian
from sawkv.prepare.text import load_text

JUDGED_SHARE = 4
"""One window of this many is kept to judge on."""


@dataclass(frozen=True)
class Saving:
    """What is saved in the rows of K or V of one layer.

    Attributes:
        plain, centered: squared error as a share of the variance, without and with the center.
        cost_plain, cost_centered: what the errors cost, as a share of what the rows' distance from their mean would: for K the squared
            error of scores as a share of their variance, for V that of the output.
        cost_fed_back: the same with feedback, and with the center if that is used; None where none was fitted.
    """

    plain: float
    centered: float
    cost_plain: float
    cost_centered: float
    cost_fed_back: float | None = None

    @property
    def centers(self) -> bool:
        """Whether the center lowers the error; if not it is left out."""
        return self.centered < self.plain

    @property
    def feeds_back(self) -> bool:
        """Whether feedback lowers the cost; if not it is left out."""
        return self.cost_fed_back is not None and self.cost_fed_back < (self.cost_centered if self.centers else self.cost_plain)

    @property
    def cost_used(self) -> float:
        """With what is written."""
        without = self.cost_centered if self.centers else self.cost_plain
        return without if self.cost_fed_back is None else min(without, self.cost_fed_back)


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
    feedback: bool = True,
) -> int:
    """Measure, write `out`, and print what it saves. Returns 0.

    Args:
        model_folder: a checkpoint directory.
        text_file: UTF-8 text; None is the model's own held-out text.
        out: the file to write.
        cache_format: name of the format that will be served.
        context: tokens of the sequences that will be served.
        window: tokens read from an empty cache at a time, at positions somewhere in that context.
        windows: how many, a quarter of them to judge on.
        device: None is a GPU where there is one.
        feedback: whether to fit it, where the format can have it.

    Raises:
        SawkvError: bad input, by name.
    """
    wanted = CacheFormat.parse(cache_format)
    check_writable(out)
    window = min(window, context)
    text = load_text(model_folder, text_file)
    for_judging = max(1, windows // JUDGED_SHARE)
    judged, fitted = text.split(window, for_judging, max(1, windows - for_judging))  # from the end, as `sawkv eval` calibrates
    where = find_device(device)
    model = EvalModel.load(model_folder, where, default_dtype(where))
    print(f"model   {model_folder.resolve().name}: {len(model.layers)} layers, {model.shape[1]} KV heads of {model.shape[2]}")
    print(f"text    {text.name}: {len(fitted)} windows of {window:,} tokens to measure, {len(judged)} others to judge")
    print(f"context {context:,} tokens, over which the windows are spread")
    calibration, savings = calibrate(model, wanted, fitted, judged, context, feedback)
    calibration.save(out)
    print(f"format  {calibration.format}\n")
    _print(savings)
    print(f"wrote {out}, {out.stat().st_size:,} bytes, fingerprint {calibration.fingerprint()}")
    print(f"to use it: sawkv serve {model_folder} --calibration {out}")
    return 0


def calibrate(
    model: EvalModel, cache_format: CacheFormat, fitted: torch.Tensor, judged: torch.Tensor, context: int, feedback: bool = True
) -> tuple[Calibration, list[tuple[Saving, Saving]]]:
    """Centers and feedback of all layers, and what they save of K and of V in each.

    Args:
        model: its attention is as `EvalModel` needs it.
        cache_format: a quantized one; only int4 gets feedback.
        fitted, judged: [num_windows, window] token ids.
        context: tokens over which these windows are spread, at least `window`.
        feedback: whether to fit it.

    Raises:
        FormatError: the format does not quantize, or does not fit the model.
        UnsupportedError: the layers differ in shape.
    """
    _, num_kv_heads, head_dim = model.shape
    resolved = cache_format.resolve(head_dim)
    if not resolved.quantized:
        raise FormatError(f"calibrate: expected a quantized format such as int4-k128-v128, got {resolved}, which centers do not improve")
    centers, hessians = _measure(model, fitted, context)
    if not bool(centers.isfinite().all() and hessians.isfinite().all()):
        raise SawkvError("calibrate: expected finite Q, K and V, got NaN or infinity")
    orders = (resolved.k_rotation_order or 0, resolved.v_rotation_order or 0)
    fed: list[list[Feedback | None]] = [[None, None] for _ in centers]
    if feedback and resolved.codec == "int4":
        fed = [[fit_feedback(_in_basis(h, order)) for h, order in zip(pair, orders, strict=True)] for pair in hessians]
    del hessians
    savings = _judge(model, resolved, judged, context, centers, fed)
    config = model.model.config.get_text_config()
    shape = (2, config.num_hidden_layers, num_kv_heads, head_dim)
    chosen, weights, steps = torch.zeros(shape), torch.zeros(*shape, head_dim, dtype=torch.int8), torch.zeros(shape[:-1])
    for position, module in enumerate(model.layers):
        index = getattr(module, "layer_idx", position)  # not every layer of a hybrid model attends
        for kind, saving in enumerate(savings[position]):
            if saving.centers:
                chosen[kind, index] = centers[position, kind].cpu()
            if (found := fed[position][kind]) is not None and saving.feeds_back:
                weights[kind, index], steps[kind, index] = found.weights.cpu(), found.step.cpu()
    (k, k_step), (v, v_step) = ((w, s) if bool(w.any()) else (None, None) for w, s in zip(weights, steps, strict=True))
    fed_back = {"k_feedback": k, "k_feedback_step": k_step, "v_feedback": v, "v_feedback_step": v_step}
    return Calibration(resolved, model_id(config), chosen[0], chosen[1], **fed_back), savings


def _measure(model: EvalModel, windows: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of the rows, [num_layers, 2, num_kv_heads, head_dim] fp32, and the hessians of their errors, with one more head_dim."""
    _, num_kv_heads, head_dim = model.shape
    shape = (len(model.layers), 2, num_kv_heads, head_dim)
    rows = torch.zeros(shape, dtype=torch.float64, device=model.device)
    hessians = torch.zeros(*shape, head_dim, dtype=torch.float64, device=model.device)
    for layers in _states(model, windows, context, "measuring"):
        for layer, states in enumerate(layers):
            for kind, (x, hessian) in enumerate(_with_cost(states)):
                if x.shape[1:] != shape[2:]:
                    raise UnsupportedError(
                        f"calibrate: expected every layer to have {num_kv_heads} KV heads of {head_dim}, "
                        f"got {list(x.shape[1:])} in layer {layer}"
                    )
                rows[layer, kind] += x.sum(0, dtype=torch.float64)
                hessians[layer, kind] += hessian
    return (rows / windows.numel()).float(), (hessians / len(windows)).float()


def _judge(
    model: EvalModel,
    cache_format: CacheFormat,
    windows: torch.Tensor,
    context: int,
    centers: torch.Tensor,
    feedback: list[list[Feedback | None]],
) -> list[tuple[Saving, Saving]]:
    """The codec on other text, without and with the centers, without and with feedback. Queries judge the keys of their own window."""
    orders = (cache_format.k_rotation_order or 0, cache_format.v_rotation_order or 0)
    shape = centers.shape[:2]
    error = torch.zeros(*shape, 2, dtype=torch.float64, device=model.device)  # plain and centered
    cost = torch.zeros(*shape, 2, 2, dtype=torch.float64, device=model.device)  # the same, without and with feedback
    whole = torch.zeros(shape, dtype=torch.float64, device=model.device)
    sums = torch.zeros(2, *centers.shape, dtype=torch.float64, device=model.device)  # of rows and of their squares
    for layers in _states(model, windows, context, "judging"):
        for layer, states in enumerate(layers):
            for kind, (x, hessian) in enumerate(_with_cost(states)):
                hessian = _in_basis(hessian, orders[kind])
                for centered, center in enumerate((torch.zeros_like(centers[layer, kind]), centers[layer, kind])):
                    y = rotate(x - center, orders[kind])
                    e = _error(y, cache_format.codec)
                    error[layer, kind, centered] += e.square().sum(dtype=torch.float64)
                    cost[layer, kind, centered, 0] += _cost(e, hessian)
                    if (fed := feedback[layer][kind]) is not None:
                        cost[layer, kind, centered, 1] += _cost(_error(y, cache_format.codec, fed), hessian)
                whole[layer, kind] += _cost(rotate(x - x.mean(0), orders[kind]), hessian)
                sums[0, layer, kind] += x.sum(0, dtype=torch.float64)
                sums[1, layer, kind] += x.double().square().sum(0)
    tiny = torch.finfo(torch.float64).tiny
    variance = (sums[1] - sums[0].square() / windows.numel()).sum((-1, -2)).clamp_min(tiny)
    errors = (error / variance[..., None]).tolist()
    costs = (cost / whole.clamp_min(tiny)[..., None, None]).tolist()

    def saving(layer: int, kind: int) -> Saving:
        plain, centered = errors[layer][kind]
        (cost_plain, fed_plain), (cost_centered, fed_centered) = costs[layer][kind]
        fed = None if feedback[layer][kind] is None else fed_centered if centered < plain else fed_plain
        return Saving(plain, centered, cost_plain, cost_centered, fed)

    return [(saving(layer, 0), saving(layer, 1)) for layer in range(shape[0])]


def _states(model: EvalModel, windows: torch.Tensor, context: int, what: str) -> Iterator[list[LayerStates]]:
    """What all layers got, one window at a time."""
    pairs = zip(torch.split(windows, 1), preparation_positions(len(windows), windows.shape[1], context), strict=True)
    for ids, places in tqdm(pairs, total=len(windows), desc=what, unit="window", leave=False, disable=None):
        yield model.states(ids, places)


def _with_cost(states: LayerStates) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """K and V, each with the hessian of its errors' cost."""
    return (states.k, key_hessian(states)), (states.v, value_hessian(states))


def _in_basis(hessian: torch.Tensor, order: int) -> torch.Tensor:
    """The hessian [num_kv_heads, head_dim, head_dim] of rows that are rotated."""
    return rotate(rotate(hessian, order).mT, order)


def _error(y: torch.Tensor, codec: str, feedback: Feedback | None = None) -> torch.Tensor:
    return CODECS[codec].decode(*CODECS[codec].encode(y, feedback)) - y


def _cost(e: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Sum over rows and heads of e^T hessian e. e: [num_tokens, num_kv_heads, head_dim]."""
    return (torch.einsum("thd,hdc->thc", e, hessian) * e).sum(dtype=torch.float64)


def _print(savings: list[tuple[Saving, Saving]]) -> None:
    """A table for K and one for V."""
    for name, cost, column in zip(("K", "V"), ("scores", "the output"), zip(*savings, strict=True), strict=True):
        print(f"{name}, % of variance   squared error             of {cost}")
        print(f"{'':<18}{'plain':>10}{'centered':>10}{'plain':>16}{'centered':>10}{'with feedback':>15}")
        for layer, saving in enumerate(column):
            fed = "" if saving.cost_fed_back is None else f"{100 * saving.cost_fed_back:>15.3f}"
            unused = ["center"] * (not saving.centers) + ["feedback"] * (bool(fed) and not saving.feeds_back)
            note = f"   left out: {' and '.join(unused)}" if unused else ""
            print(
                f"{f'layer {layer}':<18}{100 * saving.plain:>10.3f}{100 * saving.centered:>10.3f}"
                f"{100 * saving.cost_plain:>16.3f}{100 * saving.cost_centered:>10.3f}{fed}{note}"
            )
        plain, used = (sum(costs) / len(column) for costs in zip(*((s.cost_plain, s.cost_used) for s in column), strict=True))
        print(f"mean of {cost}: {100 * plain:.3f} % before, {100 * used:.3f} % with what is written\n")
