"""Train a small Qwen3 model on one GPU in minutes: text and recall tasks, Muon for the matrices and AdamW for the rest.

    python -m training.train --out models/sawkv-6m --minutes 5

With --start the tokenizer and, with --key-bias, the weights of another model are where it starts: see `training.twin`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.data import END_ID, END_OF_TEXT, TaskMaker, Tokens, collect, encode, rows, train_tokenizer
from training.model import ModelConfig, Qwen3
from training.twin import make_twin


class Rows(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Training rows, drawn apart in each worker process."""

    def __init__(self, corpus: Tokens, tokenizer_json: str, length: int, task_share: float, seed: int) -> None:
        self.corpus, self.tokenizer_json, self.length, self.task_share, self.seed = (
            corpus,
            tokenizer_json,
            length,
            task_share,
            seed,
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        info = get_worker_info()
        seed = self.seed * 1000 + (info.id if info else 0)
        tasks = TaskMaker(Tokenizer.from_str(self.tokenizer_json), self.corpus, seed)
        for ids, weights in rows(self.corpus, tasks, self.length, self.task_share, seed):
            yield torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(weights)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by a Newton-Schulz iteration (Jordan et al., 2024). For 2-D weights
    only.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = _orthogonal(parameter.grad.lerp(average, group["momentum"]))
                parameter.mul_(1 - group["lr"] * 0.01)
                parameter.add_(update, alpha=-group["lr"] * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5)


def _orthogonal(gradient: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: five steps of a quintic iteration."""
    x: torch.Tensor = gradient.bfloat16()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x if wide else x.T).to(gradient.dtype)


def main() -> None:
    args = _arguments()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    config = ModelConfig(
        args.vocab, args.hidden, args.intermediate, args.layers, args.heads, args.kv_heads, rope_theta=args.rope_theta
    )

    clock = time.monotonic()
    corpus = collect(args.corpus_megabytes * 10**6)
    print(
        f"{len(corpus.train)} files from {len(corpus.packages)} packages, {time.monotonic() - clock:.0f} s", flush=True
    )
    if args.start:
        tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(corpus.train[:: max(1, len(corpus.train) // 6000)], args.vocab)
    train_ids, held_out_ids = encode(tokenizer, corpus.train), encode(tokenizer, corpus.held_out)
    print(
        f"{len(train_ids):,} training tokens, {len(held_out_ids):,} held out, {time.monotonic() - clock:.0f} s",
        flush=True,
    )
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    (args.out / "sources.txt").write_text("\n".join(corpus.packages) + "\n")
    held_out = np.load(args.start / "held_out.npz")["tokens"] if args.start else held_out_ids[: args.keep_held_out]
    np.savez_compressed(args.out / "held_out.npz", tokens=held_out)

    if args.key_bias:
        some_text = torch.from_numpy(train_ids[: 8 * 1024].astype(np.int64)).view(8, -1).to(device)
        model = make_twin(load(args.start).to(device), some_text, args.key_bias)
        config = model.config
    else:
        model = Qwen3(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters", flush=True)
    embedding = model.model.embed_tokens.weight
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and p is not embedding]
    vectors = [p for p in trained if p.ndim == 1]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=args.matrix_lr),
        torch.optim.AdamW([embedding, *vectors], lr=args.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [args.matrix_lr, args.other_lr]
    loss_of = torch.compile(_weighted_loss) if device.type == "cuda" and not args.eager else _weighted_loss
    data = DataLoader(
        Rows(train_ids, tokenizer.to_str(), args.length, args.task_share, args.seed),
        batch_size=args.rows,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if args.workers else None,
    )
    log = (args.out / "training_log.jsonl").open("w")
    started = None
    for step, (ids, weights) in enumerate(data):
        if started is None or step == 3:  # compilation and warm-up do not count
            started = time.monotonic()
        done = (time.monotonic() - started) / (args.minutes * 60)
        if done >= 1 or step == args.max_steps:
            break
        rate = min(1.0, (step + 1) / 50) * min(1.0, (1 - done) / 0.6)
        ids, weights = ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss, plain = loss_of(model, ids, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0:
            seconds = time.monotonic() - started
            record = {"step": step, "seconds": round(seconds, 1), "tokens": (step + 1) * args.rows * args.length}
            record |= {"loss": round(loss.item(), 4), "text_loss": round(plain.item(), 4), "rate": round(rate, 4)}
            log.write(json.dumps(record, separators=(",", ":")) + "\n")
            log.flush()
            if step % 250 == 0:
                print(record, flush=True)
                save(model, args.out)
    log.close()
    save(model, args.out)
    print(f"saved to {args.out}", flush=True)


def _weighted_loss(model: Qwen3, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss by weight, and the mean over tokens of weight 1, which are text."""
    losses = F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    w = weights[:, 1:].flatten()
    text = (w == 1).float()
    return (losses * w).sum() / w.sum(), ((losses * text).sum() / text.sum()).detach()


def save(model: Qwen3, folder: Path) -> None:
    """Write what Transformers and vLLM load: config, bf16 weights, tokenizer settings."""
    from safetensors.torch import save_file

    save_file(
        {name: p.detach().to(torch.bfloat16).cpu().contiguous() for name, p in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    shape = asdict(model.config)
    theta, qk_norm = shape.pop("rope_theta"), shape.pop("qk_norm")
    config = shape | {
        "architectures": ["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if qk_norm else "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape["max_position_embeddings"],
    }
    generation = {"eos_token_id": END_ID, "pad_token_id": END_ID, "do_sample": False}
    for name, content in (
        ("config", config),
        ("tokenizer_config", tokenizer_config),
        ("generation_config", generation),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def load(folder: Path) -> Qwen3:
    """A model that `save` wrote, in fp32."""
    from safetensors.torch import load_file

    stored = json.loads((folder / "config.json").read_text())
    shape = {field.name: stored[field.name] for field in fields(ModelConfig) if field.name in stored}
    model = Qwen3(ModelConfig(**shape, qk_norm=stored["model_type"] == "qwen3"))
    model.load_state_dict({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})
    return model


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5, help="training time, without set-up")
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=640)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--rope-theta", type=float, default=100_000.0)
    parser.add_argument("--length", type=int, default=4096, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=32, help="rows in a step")
    parser.add_argument("--task-share", type=float, default=0.45, help="share of rows that hold recall tasks")
    parser.add_argument("--matrix-lr", type=float, default=0.02)
    parser.add_argument("--other-lr", type=float, default=0.004)
    parser.add_argument("--corpus-megabytes", type=int, default=150)
    parser.add_argument("--keep-held-out", type=int, default=200_000, help="held-out tokens to keep for evaluation")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile: pays for runs of under a minute")
    parser.add_argument("--start", type=Path, help="a model whose tokenizer and held-out text to use")
    parser.add_argument(
        "--key-bias", type=float, default=0, help="train the twin of --start whose keys carry an offset of this size"
    )
    args = parser.parse_args()
    if args.key_bias and not args.start:
        parser.error("--key-bias: expected --start with a model to make the twin of, got none")
    if math.isnan(args.minutes) or args.minutes <= 0:
        parser.error(f"--minutes: expected a positive number, got {args.minutes}")
    return args


if __name__ == "__main__":
    main()
