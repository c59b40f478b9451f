"""Fits centers, gains and feedback of K and V to statistics, for all layers of one shape at once, on their device.

- The center is the weighted mean of a head's rows, of K one per bucket of positions (`statistics` has both). A constant
  offset widens the range of codes and carries no information.
- Gains balance channels. After a rotation all channels share one rounding error, which grows with sum_i c_i g_i^2,
  where c_i is the variance of channel i about its center and g_i its gain. Reading divides by the gain, so the error
  costs sum_i h_i / g_i^2 without feedback, with h the diagonal of the hessian. By Cauchy-Schwarz the product is
  smallest at g_i^4 = h_i / c_i. (SmoothQuant, arXiv 2211.10438, balances weights and activations in this way.) With
  feedback it is smallest where each channel has equal shares of both factors, which a few iterations find.
- Feedback is fitted to the hessian of stored rows: scaled by gains, and rotated (`format.feedback`).
- The energy of stored rows is kept. `sawkv_drift` compares the traffic's rows with it (docs/observability.md).

The hessian gives the cost e^T hessian e of a row's error e. For K the cost is the squared error of scores, from the
text's queries. For V it is the squared error of the layer's output, from the output projection; if the projection is
unknown, it is the squared error of the head's own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sawkv.errors import UnsupportedError
from sawkv.format.feedback import Feedback, cost_with_feedback, fit_feedback
from sawkv.format.layout import PAGE_SIZE_MULTIPLE, PageLayout
from sawkv.format.rotation import hadamard_matrix
from sawkv.format.spec import CacheFormat, ResolvedFormat
from sawkv.prepare.calibration import LayerCalibration
from sawkv.prepare.statistics import LayerStatistics

FLOOR = 1e-8
"""Smallest variance and importance, as a share of the head's mean, so that dead channels get finite gains."""
WIDEST = 256.0
"""Gains lie between 1 / WIDEST and WIDEST, also for channels that no query reads or no row fills."""
STEPS = 16
"""Iterations towards the best gains. After four the cost changes by less than a thousandth on most models. Queries with
large offsets take more.
"""


@torch.no_grad()
def fit(statistics: Sequence[LayerStatistics], cache_format: CacheFormat) -> list[LayerCalibration]:
    """Fit the calibration of each layer, on the statistics' device. Equal statistics give equal bytes.

    Args:
        statistics: of the layers, in order. Shapes may differ.
        cache_format: a quantized format. Those below 8 bits get feedback.

    Raises:
        UnsupportedError: the statistics of a layer have no rows, or rows that are not finite.
    """
    for index, layer in enumerate(statistics):
        sums = torch.stack([layer.squares.sum(), layer.query_gram.sum(), layer.squares.new_ones(())])
        if not any(layer.rows) or not bool(sums.isfinite().all()):
            raise UnsupportedError(
                f"preparation: expected finite Q, K and V in attention layer {index}, got"
                f" {'NaN or infinity' if any(layer.rows) else 'none'}"
            )
    fitted: dict[int, LayerCalibration] = {}
    for shape in sorted({(layer.num_kv_heads, layer.head_dim) for layer in statistics}):
        members = [i for i, layer in enumerate(statistics) if (layer.num_kv_heads, layer.head_dim) == shape]
        layout = PageLayout(cache_format.resolve(shape[1]), *shape, PAGE_SIZE_MULTIPLE)
        parts = _fit_alike([statistics[i].split(layout.parts) for i in members], layout.format)
        fitted.update(zip(members, (_joined(part, shape) for part in parts), strict=True))
    return [fitted[i] for i in range(len(statistics))]


def _fit_alike(statistics: list[LayerStatistics], cache_format: ResolvedFormat) -> list[LayerCalibration]:
    """Fit layers of one shape together."""
    heads = statistics[0].num_kv_heads
    weights = torch.stack([layer.weights.sum(0) for layer in statistics])[..., None]
    weighted, plain = (
        torch.stack(x) for x in zip(*(layer.squares_about_centers() for layer in statistics), strict=True)
    )
    variance = weighted / weights.clamp_min(torch.finfo(torch.float64).tiny)  # [num_layers, 2, num_kv_heads, head_dim]
    keys = torch.stack([layer.query_gram / layer.queries for layer in statistics])
    values = torch.stack([_value_hessian(layer) for layer in statistics])
    hessians = torch.stack([keys, values], 1)
    rows = variance.new_tensor([sum(layer.rows) for layer in statistics])[:, None, None]
    feeds_back = cache_format.feeds_back
    gains = torch.empty_like(variance)
    feedback: list[list[Feedback | None]] = [[None, None] for _ in statistics]
    for kind, order in enumerate((cache_format.k_rotation_order, cache_format.v_rotation_order)):
        hessian = hessians[:, kind].flatten(0, 1)
        found = _gains(variance[:, kind].flatten(0, 1), hessian, order, feeds_back).float().double()
        gains[:, kind] = found.view(-1, heads, found.shape[-1])
        if feeds_back:
            fed = fit_feedback(_in_basis(_stored(hessian, found), order))
            for layer, pair in enumerate(feedback):
                part = slice(layer * heads, (layer + 1) * heads)
                pair[kind] = Feedback(fed.weights[part].clone(), fed.step[part].clone())
    energies = ((plain * gains.square()).sum(-1) / rows).float()
    return [
        LayerCalibration(
            k_center=layer.centers[:, 0].clone(),
            v_center=layer.centers[0, 1].clone(),
            k_gain=gains[i, 0].float(),
            v_gain=gains[i, 1].float(),
            k_feedback=feedback[i][0],
            v_feedback=feedback[i][1],
            k_energy=energies[i, 0].clone(),
            v_energy=energies[i, 1].clone(),
        )
        for i, layer in enumerate(statistics)
    ]


def _joined(part: LayerCalibration, shape: tuple[int, int]) -> LayerCalibration:
    """What was fitted to rows, with the vectors of whole heads; feedback and energies stay those of rows."""
    vectors = {name: getattr(part, name).view(shape) for name in ("v_center", "k_gain", "v_gain")}
    return replace(part, **vectors, k_center=part.k_center.view(-1, *shape))  # type: ignore[union-attr]


def _value_hessian(layer: LayerStatistics) -> torch.Tensor:
    if layer.output_gram is not None:
        return layer.output_gram
    return torch.eye(layer.head_dim, dtype=torch.float64, device=layer.sums.device).expand(layer.num_kv_heads, -1, -1)


def _gains(variance: torch.Tensor, hessian: torch.Tensor, order: int, feeds_back: bool) -> torch.Tensor:
    """Gains [..., head_dim] with geometric mean 1, dead channels apart. A common factor would change nothing."""
    variance, importance = _floored(variance), _floored(hessian.diagonal(dim1=-2, dim2=-1))
    best = _normalized((importance / variance).pow(0.25))
    if not feeds_back:
        return best
    least, step = torch.full_like(variance[:, :1], torch.inf), torch.full_like(variance[:, :1], 0.25)
    gains, direction = best, torch.zeros_like(best)
    for _ in range(STEPS):
        stored = _stored(hessian, gains)
        cost, derivative = cost_with_feedback(_in_basis(stored, order))
        wide = variance * gains.square()
        total = cost[:, None].log() + wide.sum(-1, keepdim=True).log()
        shares = _floored((stored * _in_basis(derivative, order)).sum(-1) / cost[:, None])
        better = total < least
        best, least = gains.where(better, best), total.where(better, least)
        direction = (shares * wide.sum(-1, keepdim=True) / wide).log().clamp(-2, 2).where(better, direction)
        step = step.where(better, step / 4)  # no better: a smaller step from the best gains so far
        gains = _normalized(best * (step * direction).exp())
    return best


def _normalized(gains: torch.Tensor) -> torch.Tensor:
    logarithm = gains.log()
    return (logarithm - logarithm.mean(-1, keepdim=True)).exp().clamp(1 / WIDEST, WIDEST)


def _stored(hessian: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """The hessian of rows after they are multiplied by gains."""
    return hessian / gains[..., :, None] / gains[..., None, :]


def _floored(x: torch.Tensor) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.maximum(x, mean * FLOOR)


def _in_basis(hessian: torch.Tensor, order: int) -> torch.Tensor:
    """The hessian [num_kv_heads, head_dim, head_dim] of rotated rows, fp64. Applied twice, it is the identity."""
    size = hessian.shape[-1]
    if not order:
        return hessian.double()
    rotation = torch.kron(torch.eye(size // order, dtype=torch.float64), hadamard_matrix(order)).to(hessian.device)
    rotated: torch.Tensor = rotation @ hessian.double() @ rotation
    return rotated
