"""A table of an evaluation for the terminal."""

from __future__ import annotations

from sawkv.lab.records import FLOOR, Evaluation, MethodResult

WIDTH = 80
HEAD = f"{'method':<27}{'bits':>6}{'mean KL':>9}{'+-':>9}{'p99.9':>8}{'top-1':>8}{'ppl':>10}"


def table(evaluation: Evaluation) -> str:
    """The evaluation as text of at most 80 columns."""
    shape, reference = evaluation.shape, evaluation.reference
    heads = (
        f"{shape.num_layers} layers, {shape.num_q_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim}"
    )
    lines = [
        f"{evaluation.model}{f', stress {evaluation.stress}' if evaluation.stress > 1 else ''}: {heads}",
        f"{evaluation.text}: {reference.divergence.tokens:,} predictions in windows of {evaluation.window:,}",
        f"{evaluation.dtype} on {evaluation.device}, in {evaluation.seconds:,.0f} s",
        "KL in nats a token, from the model with an unquantized cache; +-: one SE",
        "",
        HEAD,
        *(line(result, reference.divergence.tokens) for result in (reference, *evaluation.results)),
    ]
    if any(result.method == FLOOR for result in evaluation.results):
        lines.append(f"{FLOOR}: what 16-bit arithmetic alone changes; its cache is not quantized")
    if any(result.recall or result.free_run for result in evaluation.results):
        lines += ["", f"{'greedy':<27}{'pass-key':>10}{'needle':>10}{'same text for':>18}"]
        lines += [_greedy(result) for result in (reference, *evaluation.results) if result.recall or result.free_run]
    return "\n".join(lines)


def line(result: MethodResult, tokens: int | None = None) -> str:
    """One row of the table: a method's predictions. The perplexity is left out where it is not of `tokens` tokens."""
    d = result.divergence
    ppl = f"{d.ppl:.3f}" if tokens in (None, d.tokens) else ""
    return (
        f"{result.method:<27}{result.bits:>6.2f}{d.mean_kl:>9.5f}{d.kl_se:>9.5f}"
        f"{d.kl_p999:>8.3f}{d.same_top1:>8.1%}{ppl:>10}"
    )


def _greedy(result: MethodResult) -> str:
    run = result.free_run
    same = "" if run is None else f"{run.mean:.0f} of {run.limit} tokens"
    return (
        f"{result.method:<27}{_share(result.recalled('passkey')):>10}{_share(result.recalled('needle')):>10}{same:>18}"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
