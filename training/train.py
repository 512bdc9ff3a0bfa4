"""Train the shipped GPT from scratch on the table of facts. `python training/train.py --help`.

    python training/train.py --out runs/almanac --steps 2200 --decay 800

Constant learning rate, then a linear decay over the last `--decay` steps. A checkpoint is written every `--save` steps,
and a restarted run resumes from it, also with another number of steps.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from corpus import END, TrainingCorpus, train_tokenizer
from recall import recall
from table import Fact, find_problems, read_table, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


def build_model(vocab_size: int, args: argparse.Namespace) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=args.row,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        n_inner=args.inner,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(args.seed)
    return GPT2LMHeadModel(config)


def optimizers(model: torch.nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, norms and biases."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and ".h." in name else others).append(p)
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.1),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def learning_rate_factor(step: int, args: argparse.Namespace) -> float:
    """Return the fraction of the learning rate at `step`: warm-up, constant, linear decay to zero."""
    factor: float = min(1.0, (step + 1) / args.warmup, max(0.0, (args.steps - step) / max(1, args.decay)))
    return factor


def weighted_loss(model: GPT2LMHeadModel, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.lm_head(model.transformer(ids).last_hidden_state)[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    w = weights[:, 1:].flatten()
    return (loss * w).sum() / w.sum()


def save_model(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save a folder for `from_pretrained`, with fp16 weights."""
    half = GPT2LMHeadModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(args: argparse.Namespace, facts: list[Fact]) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    raw = train_tokenizer(facts, args.vocab)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=END, eos_token=END)
    write_jsonl(facts, out / "facts.jsonl")
    corpus = TrainingCorpus(facts, raw, args.row)
    model = build_model(raw.get_vocab_size(), args)
    optimizer_list = optimizers(model, args)
    base = [group["lr"] for o in optimizer_list for group in o.param_groups]
    start, state = 0, out / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        start = saved["step"]
        model.load_state_dict(saved["model"])
        for o, s in zip(optimizer_list, saved["optimizers"], strict=True):
            o.load_state_dict(s)
    loss_of = torch.compile(weighted_loss) if args.compile else weighted_loss
    batches = corpus.batches(args.seed + start, args.batch)
    started = time.time()
    for step in range(start, args.steps):
        groups = [g for o in optimizer_list for g in o.param_groups]
        for group, lr in zip(groups, base, strict=True):
            group["lr"] = lr * learning_rate_factor(step, args)
        ids, weights = (torch.from_numpy(x) for x in next(batches))
        loss = loss_of(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizer_list:
            o.step()
            o.zero_grad()
        done = step + 1
        if done % 20 == 0:
            speed = (time.time() - started) / (done - start)
            print(f"step {done}/{args.steps} loss {loss.item():.3f} {speed:.2f} s/step", flush=True)
        if done % args.save == 0 or done == args.steps:
            figures = recall(model, tokenizer, facts, sample=500)
            print(json.dumps({"step": done, **figures}), flush=True)
            save_model(model, tokenizer, out)
            saved = {
                "step": done,
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizer_list],
            }
            torch.save(saved, out / "state.tmp")
            (out / "state.tmp").replace(state)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    p.add_argument("--out", default="runs/almanac", help="folder of the model and its checkpoint")
    p.add_argument("--steps", type=int, default=2200)
    p.add_argument("--decay", type=int, default=800, help="last steps, with falling learning rate")
    p.add_argument("--warmup", type=int, default=100)
    p.add_argument("--batch", type=int, default=24, help="rows in a batch")
    p.add_argument("--row", type=int, default=128, help="tokens in a row, and positions")
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--width", type=int, default=320)
    p.add_argument("--inner", type=int, default=1920, help="width of the MLP")
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--vocab", type=int, default=6000)
    p.add_argument("--lr", type=float, default=3e-3, help="AdamW")
    p.add_argument("--muon-lr", type=float, default=0.012)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save", type=int, default=200, help="steps between checkpoints")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return p.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    facts = read_table()
    if messages := find_problems(facts):
        raise SystemExit("The table has problems:\n" + "\n".join(messages))
    train(args, facts)


if __name__ == "__main__":
    main()
