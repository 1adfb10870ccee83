"""Train the text model: a small Llama on the documentation and library sources of the machine.

The corpus comes from ``text_corpus``; a byte-level BPE tokenizer is trained on its training split.  Files
are packed with ``<s>`` in front of each.  Most of the training uses short sequences, the end longer ones.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from text_corpus import Document, gather
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = 0, 1
# (share of the run at which it starts, sequence length)
PHASES = ((0.0, 512), (0.80, 1024), (0.93, 2048))


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """Byte-level BPE with ``<s>`` in front of every encoded text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "</s>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=16,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    wrap: Any = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size: int, seed: int) -> Any:
    """Create the model; residual outputs start smaller, as usual for deep stacks."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
        elif parameter.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.04)
    return model


def encode(tokenizer: Any, documents: list[Document]) -> np.ndarray[Any, Any]:
    """All documents as one token stream, each with ``<s>`` in front."""
    stream: list[int] = []
    for start in range(0, len(documents), 256):
        for encoding in tokenizer.backend_tokenizer.encode_batch([d.text for d in documents[start : start + 256]]):
            stream += encoding.ids
    return np.asarray(stream, dtype=np.int32)


@torch.no_grad()
def validation(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    length: int = 1024,
    max_windows: int = 1_000_000,
) -> dict[str, float]:
    """Loss per token, perplexity and bits per byte; files are cut into windows of their own."""
    model.eval()
    nats, tokens, size, windows = 0.0, 0, 0, 0
    for document in documents:
        ids = tokenizer.backend_tokenizer.encode(document.text).ids[1:]
        for start in range(0, len(ids), length - 1):
            piece = ids[start : start + length - 1]
            if windows >= max_windows or len(piece) < 16:
                continue
            batch = torch.tensor([[BOS, *piece]])
            logits = model(input_ids=batch).logits.float()
            nats += torch.nn.functional.cross_entropy(logits[0, :-1], batch[0, 1:], reduction="sum").item()
            tokens, windows = tokens + len(piece), windows + 1
            size += len(tokenizer.decode(piece).encode())
    model.train()
    loss = nats / max(tokens, 1)
    return {
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "bits_per_byte": round(nats / math.log(2) / max(size, 1), 4),
        "tokens": tokens,
        "bytes": size,
    }


def by_source(documents: list[Document]) -> dict[str, list[Document]]:
    """Group documents by where they come from."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.source, []).append(document)
    return groups


def save(model: Any, tokenizer: Any, out: Path, log: dict[str, Any]) -> None:
    """Write bfloat16 weights, tokenizer and log."""
    out.mkdir(parents=True, exist_ok=True)
    clone: Any = LlamaForCausalLM(model.config)
    clone.load_state_dict(model.state_dict())
    clone.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")


def train(args: argparse.Namespace) -> None:
    """Train until the step or time limit."""
    documents = gather()
    training = [d for d in documents if not d.held_out]
    held_out = [d for d in documents if d.held_out]
    if args.init:
        tokenizer: Any = AutoTokenizer.from_pretrained(args.init)
    else:
        tokenizer = train_tokenizer([d.text for d in training], args.vocab)
    rng = np.random.default_rng(args.seed)
    # the standard library is the target domain and small: it goes in twice
    order = training + [d for d in training if d.source == "stdlib"]
    order = [order[i] for i in rng.permutation(len(order))]
    stream = torch.from_numpy(encode(tokenizer, order).astype(np.int64))
    print(
        f"{len(training)} files, {sum(len(d.text) for d in training)} characters, {len(stream)} tokens "
        f"(standard library twice), {len(held_out)} files held out",
        flush=True,
    )
    model = build_model(len(tokenizer), args.seed)
    if args.init:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32).state_dict())
    size = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    forward: Any = torch.compile(model, dynamic=False) if args.compile else model
    step, seen, running, starts = 0, 0, 0.0, torch.empty(0)
    phase_length = 0
    position, began = 0, time.monotonic()
    while True:
        progress = max(step / args.steps, (time.monotonic() - began) / (60 * args.minutes))
        if progress >= 1:
            break
        length = [n for at, n in PHASES if progress >= at][-1]
        if length != phase_length:
            phase_length, position = length, 0
            offset = int(rng.integers(length))
            starts = torch.from_numpy(rng.permutation((len(stream) - offset - 1) // length) * length + offset)
        rate = args.lr * min((step + 1) / args.warmup, 0.04 + 0.48 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = args.batch_tokens // length
        if position + rows > len(starts):
            position = 0
        chosen = starts[position : position + rows].tolist()
        windows = torch.stack([stream[s : s + length + 1] for s in chosen])
        position += rows
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            logits = forward(input_ids=windows[:, :-1], use_cache=False).logits
        loss: Any = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + rows * length
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 20 == 0:
            minutes = (time.monotonic() - began) / 60
            print(
                f"step {step} {minutes:.1f}min loss {running:.4f} lr {rate:.2e} tokens {seen} "
                f"{seen / minutes / 60:.0f}/s length {length}",
                flush=True,
            )
        if args.checkpoint and step % args.every == 0:
            result = validation(model, tokenizer, by_source(held_out)["stdlib"], max_windows=24)
            print(f"step {step} held-out standard library {result}", flush=True)
            save(model, tokenizer, args.checkpoint, {"step": step, "stdlib_part": result})
    groups = by_source(held_out)
    log = {
        "seed": args.seed,
        "steps": step,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "tokens": seen,
        "parameters": size,
        "threads": torch.get_num_threads(),
        "bf16_autocast": args.bf16,
        "batch_tokens": args.batch_tokens,
        "lr": args.lr,
        "phases": PHASES,
        "training_files": len(training),
        "training_characters": sum(len(d.text) for d in training),
        "stream_tokens": len(stream),
        "training_loss": round(running, 4),
        "validation": {
            name: validation(model, tokenizer, group, max_windows=args.windows) for name, group in groups.items()
        },
    }
    save(model, tokenizer, args.out, log)
    print(json.dumps(log))


def main() -> None:
    """Command line."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop after this many steps")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this many minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=here / "text")
    parser.add_argument("--checkpoint", type=Path, default=None, help="folder for checkpoints on the way")
    parser.add_argument("--init", type=Path, default=None, help="go on from a saved model and its tokenizer")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--windows", type=int, default=60, help="validation windows per source at the end")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--batch-tokens", type=int, default=3072)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
