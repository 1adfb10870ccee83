"""Re-measure both test models and print the result as JSON.

The text model is measured on held-out files of the running machine's own standard library (the split is a
hash of the file name, so these were not trained on wherever the Python version is the same), the recall
model on freshly drawn samples, with full attention and with attention between passages blocked.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import recall_task
import torch
from text_corpus import gather
from train_text import by_source, validation
from transformers import AutoModelForCausalLM, AutoTokenizer


def evaluate_text(path: Path, source: str, windows: int) -> dict[str, Any]:
    """Loss, perplexity and bits per byte on the held-out files (``source``: ``stdlib`` or ``all``)."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    held_out = [d for d in gather(None if source == "all" else source) if d.held_out]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        **{
            name: {"files": len(group), **validation(model, tokenizer, group, max_windows=windows)}
            for name, group in by_source(held_out).items()
        },
    }


def evaluate_recall(path: Path, seed: int, samples: int) -> dict[str, Any]:
    """Accuracy per setting, full and blocked, and a check that the tokenizer agrees with the task."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    words = recall_task.vocabulary()
    agrees = tokenizer.convert_tokens_to_ids(words) == list(range(len(words)))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer_agrees": agrees,
        "settings": recall_task.evaluate(model, seed, samples),
    }


def main() -> None:
    """Command line."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, default=here / "text")
    parser.add_argument("--recall", type=Path, default=here / "recall")
    parser.add_argument("--only", choices=("text", "recall"), default=None)
    parser.add_argument("--source", default="stdlib", help="held-out text: stdlib, perl, man, doc or all")
    parser.add_argument("--windows", type=int, default=1000, help="most 1024-token windows per source")
    parser.add_argument("--samples", type=int, default=64, help="recall prompts per setting")
    parser.add_argument("--seed", type=int, default=10_000_019)
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON to this file")
    args = parser.parse_args()
    began = time.monotonic()
    report: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if args.only != "recall":
        report["text"] = evaluate_text(args.text, args.source, args.windows)
    if args.only != "text":
        report["recall"] = evaluate_recall(args.recall, args.seed, args.samples)
    report["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
