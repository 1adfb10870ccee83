"""Synthetic recall task: generator, attention masks and accuracy evaluation.

A sample is a prompt ``<s> [filler prefix] passage ... passage`` followed by queries.  Passages hold
statements of two adjacent tokens, a binding ``name value`` or an alias ``name name``, and a dot.  A query is
``Q name`` and its answer is the value bound to the name (one hop) or to the name it is an alias of
(two hops).  Filler tokens may stand between statements and passages may be separated by ``<sep>``.

Attending across passages is what a two-hop query needs when its alias and its binding are in different
passages, so the accuracy with passage-to-passage attention blocked measures what is lost when passages
are prefilled alone and their key/value caches are simply concatenated.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

N_SYMBOLS, N_FILLERS = 144, 47
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<sep>", "Q")
PAD, BOS, EOS, UNK, SEP, QUERY = range(len(SPECIALS))
SYMBOL0 = len(SPECIALS)
FILLER0 = SYMBOL0 + N_SYMBOLS
DOT = FILLER0 + N_FILLERS
VOCAB_SIZE = DOT + 1

Layout = Literal["bindings_first", "shuffled", "any_order", "aliases_first"]
Statement = tuple[int, int]


def vocabulary() -> list[str]:
    """Return the token strings in id order (symbols ``s0``.., fillers ``f0``.., the dot)."""
    symbols = [f"s{i}" for i in range(N_SYMBOLS)]
    return [*SPECIALS, *symbols, *(f"f{i}" for i in range(N_FILLERS)), "."]


@dataclass
class Sample:
    """One prompt with its queries.

    ``answer_positions[i]`` is the index of the answer token of query ``i``; the model predicts it at the
    position before.  ``boundaries`` are the half-open token spans of the passages, in prompt order; a
    separator belongs to the passage it precedes.  Everything before the first span is the prefix.
    ``hops`` is 1 or 2 per query, ``cross`` tells whether a two-hop query spans two passages, and
    ``repeated`` whether the same name was already asked earlier in the sample.  ``resolved`` lists
    (position, value) of the second token of every alias whose target is bound earlier in the prompt.
    """

    tokens: list[int]
    answer_positions: list[int] = field(default_factory=list)
    hops: list[int] = field(default_factory=list)
    cross: list[bool] = field(default_factory=list)
    repeated: list[bool] = field(default_factory=list)
    boundaries: list[tuple[int, int]] = field(default_factory=list)
    resolved: list[Statement] = field(default_factory=list)

    @property
    def context_length(self) -> int:
        """Number of tokens before the first query."""
        return self.boundaries[-1][1]

    @property
    def passages(self) -> list[list[int]]:
        """Token lists of the passages."""
        return [self.tokens[a:b] for a, b in self.boundaries]


def _split(items: list[Statement], parts: int, rng: random.Random) -> list[list[Statement]]:
    """Cut a list into ``parts`` consecutive runs, none empty where there are enough items."""
    if parts > len(items):
        return [[item] for item in items] + [[] for _ in range(parts - len(items))]
    cuts = sorted(rng.sample(range(1, len(items)), parts - 1))
    return [items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)]


def make_sample(
    rng: random.Random,
    bindings: int = 12,
    aliases: int = 8,
    passages: int = 2,
    layout: Layout = "bindings_first",
    separators: bool = True,
    dots: bool = True,
    prefix: int = 0,
    filler: int = 0,
    queries: int | None = None,
    repeats: int = 1,
) -> Sample:
    """Draw one sample.

    ``bindings`` and ``aliases`` count statements (fewer than 144 together); each alias points to a bound
    name.  Names are distinct symbols and values are drawn from the symbols that are not names.
    ``layout`` says where statements stand: all bindings in the earlier passages (``bindings_first``), all
    aliases there, a mixture in which an alias comes after the binding it points to (``shuffled``), or any
    order at all.  ``separators`` puts ``<sep>`` before every passage, ``dots`` a dot after every statement.
    ``prefix`` is the number of filler tokens after ``<s>`` and ``filler`` the total number of filler
    tokens strewn between statements.  ``queries`` limits how many names are asked (default: all) and
    every one of these is asked ``repeats`` times.
    """
    symbols = rng.sample(range(SYMBOL0, SYMBOL0 + N_SYMBOLS), N_SYMBOLS)
    names, values = symbols[: bindings + aliases], symbols[bindings + aliases :]
    value_of = {n: rng.choice(values) for n in names[:bindings]}
    target_of = {n: rng.choice(names[:bindings]) for n in names[bindings:]}
    bound: list[Statement] = list(value_of.items())
    linked: list[Statement] = list(target_of.items())
    if layout in ("shuffled", "any_order") or not linked or passages == 1:
        key = {n: rng.random() for n in names}
        if layout != "any_order":  # a random order with every alias after the binding it points to
            key |= {n: key[t] + (1 - key[t]) * key[n] for n, t in target_of.items()}
        parts = _split(sorted(bound + linked, key=lambda s: key[s[0]]), passages, rng)
    else:
        first, second = (bound, linked) if layout == "bindings_first" else (linked, bound)
        head = rng.randint(1, passages - 1)
        parts = _split(first, head, rng) + _split(second, passages - head, rng)
    total = sum(len(p) for p in parts)
    gaps = [0] * total
    for _ in range(filler):
        gaps[rng.randrange(total)] += 1

    def fill(count: int) -> list[int]:
        return [rng.randrange(FILLER0, FILLER0 + N_FILLERS) for _ in range(count)]

    sample = Sample([BOS, *fill(prefix)])
    home: dict[int, int] = {}
    tokens = sample.tokens
    gap = iter(gaps)
    for index, part in enumerate(parts):
        start = len(tokens)
        if separators:
            tokens.append(SEP)
        for statement in part:
            tokens += statement
            if statement[1] in home:
                sample.resolved.append((len(tokens) - 1, value_of[statement[1]]))
            if dots:
                tokens.append(DOT)
            tokens += fill(next(gap))
            home[statement[0]] = index
        sample.boundaries.append((start, len(tokens)))
    asked = rng.sample(names, min(queries or len(names), len(names)))
    order = asked * repeats
    rng.shuffle(order)
    seen: set[int] = set()
    for name in order:
        target = target_of.get(name, name)
        tokens += [QUERY, name, value_of[target]]
        sample.answer_positions.append(len(tokens) - 1)
        sample.hops.append(1 if target == name else 2)
        sample.cross.append(home[target] != home[name])
        sample.repeated.append(name in seen)
        seen.add(name)
    return sample


def attention_mask(sample: Sample, block_passages: bool, share_prefix: bool = True) -> torch.Tensor:
    """Boolean (T, T) mask, true where attending is allowed.

    Queries never see each other, so each is answered as if it were the only one.  With
    ``block_passages`` a passage sees itself alone (and the prefix if ``share_prefix``), while the
    queries still see every passage.
    """
    n = len(sample.tokens)
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    if block_passages:
        prefix_end = sample.boundaries[0][0]
        for start, end in sample.boundaries:
            mask[start:end, (prefix_end if share_prefix else 0) : start] = False
    for position in sample.answer_positions:
        mask[position - 2 : position + 1, sample.context_length : position - 2] = False
    return mask


def position_ids(sample: Sample) -> list[int]:
    """Positions under which every query directly follows the passages."""
    context = sample.context_length
    return [i if i < context else context + (i - context) % 3 for i in range(len(sample.tokens))]


@torch.no_grad()
def accuracy(
    model: Any,
    seed: int,
    samples: int = 128,
    block_passages: bool = False,
    share_prefix: bool = True,
    batch_size: int = 8,
    **spec: Any,
) -> dict[str, float]:
    """Accuracy per kind of query over fresh samples drawn with ``make_sample(rng, **spec)``."""
    rng = random.Random(seed)
    right: dict[str, int] = {}
    count: dict[str, int] = {}
    lengths = 0
    for begin in range(0, samples, batch_size):
        batch = [make_sample(rng, **spec) for _ in range(min(batch_size, samples - begin))]
        width = max(len(s.tokens) for s in batch)
        ids = torch.full((len(batch), width), PAD)
        positions = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.eye(width, dtype=torch.bool).repeat(len(batch), 1, 1, 1)
        for row, sample in enumerate(batch):
            n = len(sample.tokens)
            lengths += sample.context_length
            ids[row, :n] = torch.tensor(sample.tokens)
            positions[row, :n] = torch.tensor(position_ids(sample))
            mask[row, 0, :n, :n] = attention_mask(sample, block_passages, share_prefix)
        bias = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
        guess = model(input_ids=ids, position_ids=positions, attention_mask=bias).logits.argmax(-1)
        for row, sample in enumerate(batch):
            for position, hop, cross in zip(sample.answer_positions, sample.hops, sample.cross, strict=True):
                ok = int(guess[row, position - 1]) == sample.tokens[position]
                kinds = ["one_hop" if hop == 1 else "two_hop"]
                if hop == 2:
                    kinds.append("two_hop_cross" if cross else "two_hop_within")
                for kind in kinds:
                    right[kind] = right.get(kind, 0) + ok
                    count[kind] = count.get(kind, 0) + 1
    result = {kind: round(right[kind] / count[kind], 4) for kind in sorted(count)}
    return {
        **result,
        "queries": float(sum(count[k] for k in ("one_hop", "two_hop") if k in count)),
        "mean_context": round(lengths / samples, 1),
    }


EVAL_SPECS: dict[str, dict[str, Any]] = {
    "bindings_first_2p": {"bindings": 12, "aliases": 10, "passages": 2},
    "shuffled_2p": {"bindings": 12, "aliases": 10, "passages": 2, "layout": "shuffled"},
    "shuffled_4p": {"bindings": 20, "aliases": 16, "passages": 4, "layout": "shuffled", "prefix": 16},
    "bindings_first_4p_long": {"bindings": 24, "aliases": 20, "passages": 4, "prefix": 64, "filler": 96},
    "shuffled_4p_512": {
        "bindings": 24,
        "aliases": 20,
        "passages": 4,
        "layout": "shuffled",
        "prefix": 64,
        "filler": 320,
    },
    "shuffled_4p_1000": {
        "bindings": 24,
        "aliases": 20,
        "passages": 4,
        "layout": "shuffled",
        "prefix": 128,
        "filler": 720,
    },
    "any_order_2p": {"bindings": 12, "aliases": 10, "passages": 2, "layout": "any_order"},
    "aliases_first_2p": {"bindings": 12, "aliases": 10, "passages": 2, "layout": "aliases_first"},
}


def evaluate(model: Any, seed: int = 10_000_019, samples: int = 64) -> dict[str, Any]:
    """Full and blocked accuracy for every evaluation setting."""
    model.eval()
    report: dict[str, Any] = {}
    for name, spec in EVAL_SPECS.items():
        report[name] = {
            "full": accuracy(model, seed, samples, **spec),
            "blocked": accuracy(model, seed, samples, block_passages=True, **spec),
            "blocked_no_prefix": accuracy(model, seed, samples, block_passages=True, share_prefix=False, **spec),
        }
    return report


def main() -> None:
    """Print the accuracies of a saved model as JSON."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "recall")
    parser.add_argument("--seed", type=int, default=10_000_019)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    print(json.dumps(evaluate(model, args.seed, args.samples), indent=1))


if __name__ == "__main__":
    main()
