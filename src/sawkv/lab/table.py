"""An evaluation as lines of text, for the terminal."""

from __future__ import annotations

from sawkv.lab.records import Evaluation, MethodResult


def table(evaluation: Evaluation) -> str:
    """The evaluation in lines of text."""
    shape = evaluation.shape
    head = [
        f"{evaluation.model}: {shape.num_layers} layers, {shape.num_q_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim}; "
        f"{evaluation.dtype} on {evaluation.device}; {evaluation.seconds:.0f} s",
        f"text {evaluation.text}: {evaluation.reference.divergence.tokens:,} predictions in windows of {evaluation.window}"
        + (f"; stress {evaluation.stress}" if evaluation.stress > 1 else ""),
        "KL from the model with its cache unquantized, nats a token; +- is one standard error",
        "",
        f"{'method':<26} {'bits':>6} {'mean KL':>9} {'+-':>8} {'p99.9':>8} {'max':>7} {'top-1':>7} {'ppl':>9} "
        f"{'pass-key':>9} {'needle':>7} {'same for':>9}",
    ]
    return "\n".join([*head, *(_line(result) for result in (evaluation.reference, *evaluation.results))])


def _line(result: MethodResult) -> str:
    d = result.divergence
    run = result.free_run
    return (
        f"{result.method:<26} {result.bits:>6.3f} {d.mean_kl:>9.5f} {d.kl_se:>8.5f} {d.kl_p999:>8.4f} {d.kl_max:>7.3f} {d.same_top1:>7.2%} "
        f"{d.ppl:>9.4f} {_share(result.recalled('passkey')):>9} {_share(result.recalled('needle')):>7} "
        f"{'-' if run is None else f'{run.mean:.0f}/{run.limit}':>9}"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
