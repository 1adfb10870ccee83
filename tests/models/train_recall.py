"""Train the recall model: a small Llama that answers one- and two-hop queries across passages.

The curriculum starts with two bindings and adds a binding or an alias whenever the accuracy on fresh
training batches passes 97 % (one hop) and 95 % (two hops).  Once the largest size is reached, prompts get
longer: filler prefixes, filler between statements, more passages.  The loss is on the answers, plus a
training-only loss on the output of the second layer at alias tokens whose binding came before: it makes the
cached state of an alias hold the value, which is what a query across passages needs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import deque
from pathlib import Path
from typing import Any

import recall_task as task
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MAX_BINDINGS, MAX_ALIASES = 24, 20


def build_model(seed: int, layers: int) -> Any:
    """Create the model with the initialisation that makes the task learnable at this size."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=task.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        pad_token_id=task.PAD,
        bos_token_id=task.BOS,
        eos_token_id=task.EOS,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5 if "embed_tokens" in name else 0.06)
    return model


def build_tokenizer() -> Any:
    """Word-level tokenizer over the task's vocabulary (tokens are separated by blanks)."""
    words = {word: i for i, word in enumerate(task.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", task.BOS)]
    )
    wrap: Any = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def level_sizes(level: int) -> tuple[int, int]:
    """Bindings and aliases at a curriculum level (level 0 is two bindings)."""
    extra = (level + 1) // 2
    return min(2 + level - extra, MAX_BINDINGS), min(extra, MAX_ALIASES)


LAST_LEVEL = next(k for k in range(999) if level_sizes(k) == (MAX_BINDINGS, MAX_ALIASES))


def draw_batch(rng: random.Random, level: int, tokens: int, stretches: list[int], dots: bool) -> list[task.Sample]:
    """Draw samples with a common size; ``tokens`` is about the number of tokens in it."""
    varied = min(1.0, max(0.0, (level - 2) / 20))  # plain prompts first, then more and more variation
    if level > 2:
        level = rng.randint(level // 3, level)
    bindings, aliases = level_sizes(level)
    stretch = rng.choice(stretches) if stretches else 0
    width = 6 * (bindings + aliases) + 200 * stretch
    batch = []
    for _ in range(max(4, min(64, tokens // width))):
        plain = rng.random() >= varied
        batch.append(
            task.make_sample(
                rng,
                bindings,
                aliases,
                dots=dots,
                passages=2 if plain else rng.randint(1, 4),
                layout="bindings_first" if plain or rng.random() < 0.5 else "shuffled",
                separators=not plain and rng.random() < 0.8,
                prefix=0 if plain else rng.choice((0, rng.randint(1, 16 + 60 * stretch))),
                filler=0 if plain or rng.random() < 0.4 else rng.randint(0, 8 + 180 * stretch),
                queries=24 if stretches else None,
                repeats=1 if level > 2 else 2,
            )
        )
    return batch


def collate(batch: list[task.Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded token ids, labels that keep the answers only, and values known at alias tokens."""
    width = max(len(s.tokens) for s in batch)
    ids = torch.full((len(batch), width), task.PAD)
    labels = torch.full((len(batch), width), -100)
    resolved = labels.clone()
    for row, sample in enumerate(batch):
        ids[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        for position in sample.answer_positions:
            labels[row, position] = sample.tokens[position]
        for position, value in sample.resolved:
            resolved[row, position] = value
    return ids, labels, resolved


def score(batch: list[task.Sample], guess: torch.Tensor) -> dict[int, tuple[int, int]]:
    """(right, asked) per number of hops, over the names asked for the first time."""
    tally = {1: [0, 0], 2: [0, 0]}
    for row, sample in enumerate(batch):
        for position, hop, repeated in zip(sample.answer_positions, sample.hops, sample.repeated, strict=True):
            if not repeated:
                tally[hop][0] += int(guess[row, position - 1]) == sample.tokens[position]
                tally[hop][1] += 1
    return {hop: (a, b) for hop, (a, b) in tally.items()}


def save(model: Any, out: Path, log: dict[str, Any]) -> None:
    """Write bfloat16 weights, tokenizer and the training log."""
    out.mkdir(parents=True, exist_ok=True)
    clone: Any = LlamaForCausalLM(model.config)
    clone.load_state_dict(model.state_dict())
    clone.to(torch.bfloat16).save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")


def train(args: argparse.Namespace) -> None:
    """Run the curriculum until the step or the time limit, decaying the learning rate at the end."""
    model = build_model(args.seed, args.layers)
    if args.init:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32).state_dict())
    size = sum(p.numel() for p in model.parameters())
    print(f"{size} parameters, last level {LAST_LEVEL}", flush=True)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    rng = random.Random(args.seed)
    extra = torch.zeros(())
    recent: deque[dict[int, tuple[int, int]]] = deque(maxlen=args.window)
    level, step, seen, started = args.level, 0, 0, time.monotonic()
    rates: dict[int, float] = {1: 0.0, 2: 0.0}
    while True:
        progress = max(step / args.steps, (time.monotonic() - started) / (60 * args.minutes))
        if progress >= 1:
            break
        tail = min(1.0, (1 - progress) / args.tail)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * math.sin(tail * math.pi / 2))
        long = level >= LAST_LEVEL
        batch = draw_batch(rng, level, args.batch_tokens, args.stretch if long else [], args.dots)
        ids, labels, resolved = collate(batch)
        output = model(input_ids=ids, output_hidden_states=args.aux > 0, use_cache=False)
        logits = output.logits
        loss: Any = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        if args.aux > 0 and (resolved >= 0).any():
            middle = model.lm_head(model.model.norm(output.hidden_states[args.aux_layer][resolved >= 0]))
            extra = torch.nn.functional.cross_entropy(middle, resolved[resolved >= 0])
            loss = loss + args.aux * extra
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + ids.numel()
        recent.append(score(batch, logits.argmax(-1)))
        for hop in (1, 2):
            asked = sum(r[hop][1] for r in recent)
            rates[hop] = sum(r[hop][0] for r in recent) / asked if asked else 1.0
        if not long and len(recent) >= args.window and rates[1] > 0.97 and rates[2] > 0.95:
            level = min(level + (1 if level < 2 else args.jump), LAST_LEVEL)
            recent.clear()
        if step % 50 == 0:
            minutes = (time.monotonic() - started) / 60
            print(
                f"step {step} {minutes:.1f}min level {level} {level_sizes(level)} "
                f"loss {loss.item():.3f} aux {extra.item():.3f} "
                f"one {rates[1]:.3f} two {rates[2]:.3f} tokens {seen}",
                flush=True,
            )
        if step % 500 == 0 and args.checkpoint:
            save(model, args.checkpoint, {"step": step, "level": level})
    model.eval()
    log = {
        "seed": args.seed,
        "steps": step,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "tokens": seen,
        "parameters": size,
        "level": level,
        "sizes": level_sizes(level),
        "threads": torch.get_num_threads(),
        "final_training_window": rates,
    }
    save(model, args.out, log)
    print(json.dumps(log))


def main() -> None:
    """Command line."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop after this many steps")
    parser.add_argument("--minutes", type=float, default=16.0, help="stop after this many minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=here / "recall")
    parser.add_argument("--checkpoint", type=Path, default=None, help="folder for checkpoints on the way")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.01)
    parser.add_argument("--batch-tokens", type=int, default=4000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--jump", type=int, default=8, help="curriculum step once aliases are in")
    parser.add_argument("--aux", type=float, default=0.5, help="weight of the loss at alias tokens")
    parser.add_argument("--aux-layer", type=int, default=2, help="layer whose output that loss reads")
    parser.add_argument("--init", type=Path, default=None, help="start from a saved model")
    parser.add_argument("--level", type=int, default=0, help="curriculum level to start at")
    parser.add_argument("--tail", type=float, default=0.5, help="share of the run in which the rate decays")
    parser.add_argument("--dots", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--stretch",
        type=int,
        nargs="+",
        default=[0, 0, 0, 1, 2, 4],
        help="at the last level one of these is drawn per batch: 4 means up to 1100 tokens",
    )
    parser.add_argument("--window", type=int, default=6)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
