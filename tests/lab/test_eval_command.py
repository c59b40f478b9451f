"""`sawkv eval` on the shipped model, its records, its tasks, and its refusals."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.lm_eval.make_prompts import make_files
from sawkv import SawkvError, cli
from sawkv.lab import evaluate
from sawkv.lab.budget import Budget
from sawkv.lab.divergence import mean_and_error
from sawkv.lab.evaluate import collect_samples
from sawkv.lab.methods import find_method, fit
from sawkv.lab.records import Evaluation
from sawkv.lab.tasks import DEPTHS, free_run, make_prompts, recall
from sawkv.prepare.corpus import preparation_windows
from sawkv.prepare.model import EvalModel
from sawkv.prepare.text import Text, load_text, with_bos
from tests.conftest import MODEL


def test_eval_writes_records_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "NUM_WINDOWS", 2)  # to fit on
    arguments = ["--formats", "prepared,int4_plain", "--tokens", "512", "--window", "128", "--floor-tokens", "256"]
    arguments += ["--layer-tokens", "128", "--recall-lengths", "96", "--recall-count", "1", "--free-runs", "1"]
    arguments += ["--stress", "16"]
    assert cli.main(["eval", str(MODEL), *arguments, "--out", str(tmp_path / "new" / "eval.json")]) == 0
    shown = capsys.readouterr().out
    evaluation = Evaluation.from_json((tmp_path / "new" / "eval.json").read_text())
    assert Evaluation.from_json(evaluation.to_json()) == evaluation
    assert [result.method for result in evaluation.results] == ["bf16_floor", "prepared", "int4_plain"]
    assert all(result.method in shown for result in (evaluation.reference, *evaluation.results))
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 80
    floor, prepared, plain = evaluation.results
    assert floor.divergence.mean_kl < prepared.divergence.mean_kl < plain.divergence.mean_kl
    assert prepared.divergence.tokens == 4 * 127
    assert prepared.bits == 4.25
    assert [layer.layer for layer in prepared.by_layer] == list(range(evaluation.shape.num_layers))
    assert all(0 < layer.mean_kl < plain.divergence.mean_kl for layer in prepared.by_layer)
    assert {(cell.task, cell.depth) for cell in prepared.recall} == {
        (task, depth) for task in ("passkey", "needle") for depth in DEPTHS
    }
    assert evaluation.reference.passkey == 1.0
    assert prepared.free_run is not None
    assert 0 <= prepared.free_run.mean <= prepared.free_run.limit


@pytest.mark.parametrize(("asked", "context"), [(0, 8192), (300, 300)])
def test_methods_learn_what_an_engine_would_prepare_the_model_on(
    asked: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text that ships with sawkv, over the model's own context, or over that which will be served; never the text
    that is scored.
    """
    seen: list[tuple[Any, ...]] = []

    def stop(*arguments: Any) -> None:
        seen.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "collect_samples", stop)
    budget = Budget(tokens=64, window=64, floor_tokens=0, recall_count=0, free_runs=0, context=asked)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(MODEL, [find_method("prepared")], budget=budget, device=torch.device("cpu"))
    ((_, ids, given),) = seen
    assert given == context
    text = load_text(MODEL, None)
    assert torch.equal(ids, preparation_windows(text.encode, min(512, context), 8, text.prefix))


def test_another_model_needs_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in MODEL.iterdir():
        if file.suffix in {".json", ".safetensors"} and "evaluation" not in file.name:
            (tmp_path / file.name).symlink_to(file.resolve())
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "--text: expected a file" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("too short")
    assert cli.main(["eval", str(tmp_path), "--text", str(tmp_path / "short.txt")]) == 2
    assert "expected at least 1024 tokens" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe8")
    assert cli.main(["eval", str(tmp_path), "--text", str(tmp_path / "latin.txt")]) == 2
    assert "expected a UTF-8 file" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path), "--formats", "int5"]) == 2
    assert "got 'int5'" in capsys.readouterr().err
    for command in ("eval", "analyze"):
        assert cli.main([command, str(tmp_path), "--window", "8"]) == 2
        assert "expected at least 32 tokens" in capsys.readouterr().err


def test_learned_positions_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As those of GPT-2, which has 1,024. More are refused before the work, and recall leaves longer prompts out."""
    config = GPT2Config(
        vocab_size=4096, n_positions=128, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(MODEL.resolve() / file)
    (tmp_path / "text").write_text("The key is under the mat. " * 200)
    text = ["--text", str(tmp_path / "text"), "--device", "cpu"]
    assert cli.main(["prepare", str(tmp_path), "--tokens", "64", "--device", "cpu"]) == 0
    capsys.readouterr()
    for command, option, *others in (
        ("eval", "--window", *text),
        ("eval", "--context", "--window", "128", *text),
        ("analyze", "--window", *text),
        ("prepare", "--context"),
    ):
        assert cli.main([command, str(tmp_path), option, "129", *others]) == 2
        assert f"{option}: expected at most 128, the model's positions, got 129" in capsys.readouterr().err
    few = ["--window", "64", "--tokens", "64", "--layer-tokens", "0", "--floor-tokens", "0", "--free-runs", "0"]
    assert cli.main(["eval", str(tmp_path), *text, *few, "--recall-lengths", "96", "512", "--formats", "int8"]) == 0
    assert "recall prompts of 512 tokens are left out: 128 are all positions of the model" in capsys.readouterr().err


SMALL = ["--tokens", "128", "--window", "64", "--layer-tokens", "0", "--floor-tokens", "0"]
SMALL += ["--recall-count", "0", "--free-runs", "0", "--device", "cpu"]


def test_a_stopped_run_keeps_its_methods_and_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "eval.json"
    command = ["eval", str(MODEL), *SMALL, "--out", str(out), "--formats"]
    stopped = "int4_plain"

    def stop(method: Any, samples: Any) -> Any:
        if method.name == stopped:
            raise KeyboardInterrupt
        return fit(method, samples)

    few = lambda model, text, context: collect_samples(model, text.windows(64, 1))  # noqa: E731 - enough of a fit
    monkeypatch.setattr(evaluate, "shipped_samples", few)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "fit", stop)
        assert cli.main([*command, "int8,int4_plain,fp8"]) == 130
    said = f"sawkv: interrupted; {out} holds what was measured. The same command with --resume goes on\n"
    assert capsys.readouterr().err == said
    kept = Evaluation.from_json(out.read_text())
    assert [result.method for result in kept.results] == ["int8"], "a floor of 0 tokens is left out"
    marked = replace(kept.results[0].divergence, kl_max=123.0)  # what a second measurement would not give
    out.write_text(replace(kept, results=(replace(kept.results[0], divergence=marked),)).to_json())
    assert cli.main([*command, "int8,int4_plain", "--resume"]) == 0
    first, second = Evaluation.from_json(out.read_text()).results
    assert (first.divergence, second.method) == (marked, "int4_plain")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "fit", stop)
        stopped = "fp8"
        assert cli.main([*command, "int4_plain,fp8", "--resume"]) == 130
    assert Evaluation.from_json(out.read_text()).results == (second, first), "also what is not asked for again"
    capsys.readouterr()
    assert cli.main([*command, "int8", "--resume", "--window", "128"]) == 2
    assert "expected a record with the same budget" in capsys.readouterr().err
    other = replace(kept, reference=replace(kept.reference, divergence=replace(marked, ppl=2.0)))
    out.write_text(other.to_json())
    assert cli.main([*command, "int8", "--resume"]) == 2
    assert "expected a record of this model and text, whose perplexity is" in capsys.readouterr().err
    assert out.read_text() == other.to_json()
    assert cli.main(["eval", str(MODEL), *SMALL, "--resume"]) == 2
    assert "expected --out FILE" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "analyze"])
def test_a_format_that_does_not_fit_the_heads_is_refused_before_any_pass(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("a pass")

    monkeypatch.setattr(EvalModel, "hidden", fail)
    assert cli.main([command, str(MODEL), "--formats", "int8,int4-k256-v0"]) == 2
    assert "int4-k256-v0 does not fit this model" in capsys.readouterr().err


class Bigram:
    """A model that predicts well only in windows that begin with BOS."""

    def __init__(self, bos: int | None, gain: float) -> None:
        config = SimpleNamespace(bos_token_id=bos)
        self.model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
        self.device, self._bos, self._gain, self.max_positions = torch.device("cpu"), bos, gain, 99

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        sharp = self._gain if int(ids[0, 0]) == self._bos else 0.0
        return torch.nn.functional.one_hot((ids + 1) % 50, 50) * sharp

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.float()


@pytest.mark.parametrize(
    ("bos", "gain", "prefix", "wanted"),
    [(7, 4.0, (), (7,)), (7, 0.0, (), ()), (None, 4.0, (), ()), (7, 4.0, (7,), (7,))],
    ids=["lost", "needless", "none", "added"],
)
def test_a_lost_bos_is_put_back_and_said(
    bos: int | None, gain: float, prefix: tuple[int, ...], wanted: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the model predicts better after it; Qwen's and SmolLM2's tokenizers name one too, and rightly add none."""
    text = Text("t", torch.arange(10, 40), prefix, lambda text: [])
    assert with_bos(text, Bigram(bos, gain)).prefix == wanted  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert said.count("adds no BOS") == (wanted != prefix)
    assert not said or "perplexity 50.0 without it, " in said


def test_a_text_that_is_too_short_for_all_windows_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    text = Text("t", torch.arange(1000), (7,), lambda text: [])
    assert len(text.windows(101, 10)) == 10
    assert capsys.readouterr().err == ""
    assert len(text.windows(101, 99999)) == 10
    assert capsys.readouterr().err == "sawkv: t has 1,000 tokens: 10 windows of 101 are read, of 99,999 asked for\n"


def test_windows_and_calibration_are_apart() -> None:
    text = Text("t", torch.arange(1000), (7, 8), lambda text: [])
    windows, calibration = text.split(52, 100, 3)
    assert windows.shape == (17, 52)
    assert calibration.shape == (3, 52)
    assert not set(windows[:, 2:].flatten().tolist()) & set(calibration[:, 2:].flatten().tolist())
    assert windows[:, :2].tolist() == [[7, 8]] * 17


def test_prompts_hide_one_answer_where_they_say() -> None:
    text = load_text(MODEL, None)
    prompts = make_prompts(text.encode, text.ids, text.prefix, lengths=[300], count=2, seed=random.randrange(1000))
    assert len(prompts) == 2 * 2 * len(DEPTHS)
    for prompt in prompts:
        assert abs(len(prompt.ids) - 300) <= 1
        answer = prompt.ids[-prompt.answer_length :]
        places = [i for i in range(300 - len(answer)) if prompt.ids[i : i + len(answer)] == answer]
        assert any(abs(place / 300 - prompt.depth) < 0.25 for place in places)


def test_the_prompts_for_the_harness_are_those_of_the_table_in_the_documentation() -> None:
    assert {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in make_files(MODEL).items()} == {
        "passkey.jsonl": "7e120632493a9b6d",
        "table.jsonl": "bf0eaa34c4c80a29",
    }


def test_recall_counts_whole_answers() -> None:
    """The reference recalls; a cache that gives back nothing does not."""
    text = load_text(MODEL, None)
    model = EvalModel.load(MODEL, "cpu", torch.float32)
    prompts = make_prompts(text.encode, text.ids, text.prefix, lengths=[128], count=1)
    with pytest.raises(SawkvError, match=f"at most {len(text.ids)} tokens, those of the text"):
        make_prompts(text.encode, text.ids, (), lengths=[128, len(text.ids) + 1], count=1)
    blank = [(torch.zeros_like, torch.zeros_like)] * len(model.layers)
    steps: list[int] = []
    right, wrong = (recall(model, prompts, readers, tokens_at_once=600, step=steps.append) for readers in (None, blank))
    assert sum(cell.correct for cell in right) >= 8
    assert sum(cell.correct for cell in wrong) == 0
    assert sum(cell.asked for cell in right) == 10
    assert sum(steps) >= 2 * sum(len(prompt.ids) for prompt in prompts)


def test_free_runs_end_at_the_first_other_choice() -> None:
    model = EvalModel.load(MODEL, "cpu", torch.float32)
    prompt = load_text(MODEL, None).ids[None, :50]
    following = model.continue_greedily(prompt, 6).clone()
    unquantized = [None] * len(model.layers)
    assert free_run(model, prompt, following, unquantized).tokens == (6,)
    following[0, 4] = (following[0, 4] + 1) % 4096
    assert free_run(model, prompt, following, unquantized).tokens == (4,)


def test_errors_of_means() -> None:
    means = torch.rand(400).double()
    mean, error = mean_and_error(means)
    assert mean == pytest.approx(0.5, abs=0.06)
    assert error == pytest.approx(12**-0.5 / 20, rel=0.2)
    assert mean_and_error(means[:1])[1] == 0.0


def test_damaged_records_are_refused() -> None:
    with pytest.raises(SawkvError, match="does not parse"):
        Evaluation.from_json('{"model": 1}')
    with pytest.raises(SawkvError, match="does not parse"):
        Evaluation.from_json("[]")
