"""Prompts of documents that were compiled behind another beginning: of the recall task and of text.

Recall: two-hop questions whose alias and binding are in different passages. Every passage is compiled behind the same
preamble (`<s>` and fixed fillers) and stands in a prompt behind another prefix, whose KV is exact, as a prefix hit is.
Text: a prefix, documents of 128 tokens, a query of 32; what is compared is the next-token distribution at the query's
end and at the 31 tokens that really follow. The documents are consecutive pieces of one text, or pieces of different
texts of which the query continues one.
"""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvstore.connectors.blend.compiling import compile_span
from kvstore.connectors.blend.measuring import measure
from kvstore.connectors.blend.sources import Source, of_layers

MODELS = Path(__file__).resolve().parent.parent / "tests" / "models"

RECALL: dict[str, dict[str, Any]] = {
    "shuffled_2p": {"bindings": 12, "aliases": 10, "passages": 2, "layout": "shuffled", "prefix": 16},
    "shuffled_4p": {"bindings": 20, "aliases": 16, "passages": 4, "layout": "shuffled", "prefix": 16},
    "bindings_first_2p": {"bindings": 12, "aliases": 10, "passages": 2, "prefix": 16},
    "bindings_first_4p_long": {"bindings": 24, "aliases": 20, "passages": 4, "prefix": 64, "filler": 96},
}
QUESTIONS_A_SAMPLE = 4
TEXTS = ("consecutive", "mixed")
DOCUMENTS, DOCUMENT_TOKENS, QUERY_TOKENS, SCORED_TOKENS, PREAMBLE_TOKENS = 4, 128, 32, 32, 32


@dataclass(frozen=True, eq=False)
class Asked:
    """One prompt, its sources, and what is right.

    Attributes:
        ids: the prompt, without what follows.
        sources: of everything before the query.
        variants: the same documents computed behind other ones, with their statistics.
        preamble: that they were compiled behind.
        following: the tokens that really follow; of a question, its answer.
        full: log probabilities that a full prefill gives each of them and all others, (following, vocabulary).
    """

    ids: list[int]
    sources: list[Source]
    variants: list[Source]
    preamble: list[int]
    following: list[int]
    full: torch.Tensor


def trained(name: str) -> Any:
    """A trained test model in fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32, local_files_only=True)
    return model.eval()


def recall(model: Any, setting: str, count: int, seed: int = 7) -> list[Asked]:
    """Questions of one setting, a few a sample."""
    task = _recall_task()
    rng = random.Random(f"{setting} {seed}")
    fillers = range(task.FILLER0, task.FILLER0 + task.N_FILLERS)
    preamble = [task.BOS, *(rng.choice(fillers) for _ in range(16))]
    out: list[Asked] = []
    while len(out) < count:
        sample, other = (task.make_sample(rng, **RECALL[setting]) for _ in range(2))
        context = sample.tokens[: sample.context_length]
        prefix = context[: sample.boundaries[0][0]]
        built = _reused(model, preamble, prefix, sample.passages, other.passages)
        asked = [
            at
            for at, hops, cross in zip(sample.answer_positions, sample.hops, sample.cross, strict=True)
            if hops == 2 and cross
        ]
        for at in asked[: min(QUESTIONS_A_SAMPLE, count - len(out))]:
            ids = context + sample.tokens[at - 2 : at]
            out.append(_asked(model, ids, [sample.tokens[at]], preamble, built))
    return out


def text(model: Any, setting: str, count: int, seed: int = 3) -> list[Asked]:
    """Prompts of the language reference that every Python carries."""
    rng = random.Random(f"{setting} {seed}")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "text", local_files_only=True)
    start = [tokenizer.bos_token_id]
    topics = pydoc_data.topics.topics
    texts = [tokenizer(topics[name], add_special_tokens=False, verbose=False)["input_ids"] for name in sorted(topics)]
    stream = [token for ids in texts for token in ids]
    preamble = start + stream[:PREAMBLE_TOKENS]
    out = []
    for _ in range(count):
        at = rng.randrange(len(stream) - PREAMBLE_TOKENS)
        prefix = start + stream[at : at + PREAMBLE_TOKENS]
        documents, tail = _documents(rng, texts, consecutive=setting == "consecutive")
        others, _ = _documents(rng, texts, consecutive=False)
        built = _reused(model, preamble, prefix, documents, others)
        ids = prefix + [token for document in documents for token in document] + tail[:QUERY_TOKENS]
        out.append(_asked(model, ids, tail[QUERY_TOKENS:], preamble, built))
    return out


def _documents(
    rng: random.Random, texts: Sequence[list[int]], *, consecutive: bool
) -> tuple[list[list[int]], list[int]]:
    """Documents and what comes behind the one that the query belongs to."""
    tail = QUERY_TOKENS + SCORED_TOKENS
    size = DOCUMENT_TOKENS * (DOCUMENTS if consecutive else 1)
    chosen = rng.sample([ids for ids in texts if len(ids) >= size + tail], 1 if consecutive else DOCUMENTS)
    starts = [rng.randrange(len(ids) - size - tail + 1) for ids in chosen]
    pieces = [ids[at : at + size + tail] for ids, at in zip(chosen, starts, strict=True)]
    behind = rng.choice(pieces)[size:]
    documents = [piece[at : at + DOCUMENT_TOKENS] for piece in pieces for at in range(0, size, DOCUMENT_TOKENS)]
    return documents, behind


def _reused(
    model: Any,
    preamble: Sequence[int],
    prefix: Sequence[int],
    documents: Sequence[Sequence[int]],
    others: Sequence[Sequence[int]],
) -> tuple[list[Source], list[Source]]:
    """Sources of a prefix and documents: compiled behind the preamble, and computed behind one of `others` each."""
    exact = Source(0, prefix, of_layers(compile_span(model, [], prefix)), exact=True)
    sources, variants = [exact], [exact]
    at = len(prefix)
    for index, document in enumerate(documents):
        layers = compile_span(model, preamble, document)
        source = Source(at, document, of_layers(layers), position=len(preamble), document=index)
        sources.append(source)
        other = others[index % len(others)]
        begin = len(preamble) + len(other)
        spans = [("other", len(preamble), begin), (f"document {index}", begin, begin + len(document))]
        (_, statistics), cache = measure(model, [*preamble, *other, *document], spans)
        computed: Any = cache.layers
        kept = [(layer.keys[0, :, begin:], layer.values[0, :, begin:]) for layer in computed]
        variants.append(replace(source, layer=of_layers(kept), position=begin, statistics=statistics))
        at += len(document)
    return sources, variants


@torch.no_grad()
def _asked(
    model: Any, ids: list[int], following: list[int], preamble: list[int], built: tuple[list[Source], list[Source]]
) -> Asked:
    logits = model(torch.tensor([ids + following[:-1]]), logits_to_keep=len(following)).logits[0]
    return Asked(ids, *built, preamble, following, logits.log_softmax(-1))


def _recall_task() -> ModuleType:
    """tests/models/recall_task.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("kvstore_blend_recall_task", MODELS / "recall_task.py")
    assert spec is not None  # the path ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
