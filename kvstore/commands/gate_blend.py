"""`kvstore gate --blend`: measure what a recompute policy does to a model, judge it, record it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvstore import blend_gate, blend_records
from kvstore.commands.limits import limits_of
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.codec import Codec
    from kvstore.connectors.blend.gate import BlendGateReport
    from kvstore.connectors.blend.gate_trials import BlendTrial

RATIO_DEFAULT = 0.15
PASSAGES_DEFAULT = 4
PASSAGE_TOKENS_DEFAULT = 128
QUERY_TOKENS_DEFAULT = 32
FOLLOWING_DEFAULT = 32
FLAGS = ("policy", "policy_settings", "ratio", "preamble", "passages", "passage_tokens", "query_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags that only count with --blend."""
    group = parser.add_argument_group("blending", "reuse of documents anywhere in a prompt (--blend)")
    group.add_argument("--blend", action="store_true", help="measure a recompute policy instead of codecs")
    group.add_argument("--policy", metavar="NAME", help="recompute policy (default: the recommended one)")
    group.add_argument("--policy-settings", metavar="JSON", default="{}", help="its settings besides the ratio")
    group.add_argument(
        "--ratio",
        action="append",
        type=float,
        default=[],
        metavar="SHARE",
        help=f"share of reused tokens computed again; may be given several times (default {RATIO_DEFAULT})",
    )
    group.add_argument(
        "--preamble", metavar="FILE", help="text that prompts begin with and documents are computed behind"
    )
    for name, value, text in (
        ("passages", PASSAGES_DEFAULT, "documents of a prompt of the text"),
        ("passage-tokens", PASSAGE_TOKENS_DEFAULT, "tokens of each"),
        ("query-tokens", QUERY_TOKENS_DEFAULT, "tokens of the prompt behind them"),
    ):
        group.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default %(default)s)")


def given(arguments: argparse.Namespace) -> str:
    """The first flag given that only counts with --blend, "" if there is none."""
    parser: argparse.ArgumentParser = arguments.leaf
    return next(
        (f"--{name.replace('_', '-')}" for name in FLAGS if getattr(arguments, name) != parser.get_default(name)), ""
    )


def run(
    arguments: argparse.Namespace,
    directory: Path,
    codecs: Callable[[], Sequence[Codec]],
    progress: Callable[[int, int], None],
) -> int:
    """Measure, print a table, write records and report; 0, or 1 if no ratio passes."""
    from kvstore.connectors.blend import registry
    from kvstore.connectors.blend.gate import run_blend_gate
    from kvstore.connectors.gate_inputs import load_model, load_tokenizer, start_ids

    for flag in ("passages", "passage_tokens", "query_tokens"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(arguments, flag)}; give at least 1")
    ratios = sorted(set(arguments.ratio or [RATIO_DEFAULT]))
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise ConfigError(f"--ratio: {', '.join(map(str, ratios))}; each must be in 0..1")
    policy = registry.get(arguments.policy or registry.DEFAULT, **_settings(arguments.policy_settings))
    limits = limits_of(blend_gate.PURPOSES, arguments.purpose, arguments.limit)
    lossy = [codec for codec in codecs() if not codec.exact] if arguments.codecs else []
    model = load_model(arguments.model, arguments.dtype, arguments.device)
    tokenizer = load_tokenizer(arguments.model)
    preamble = start_ids(tokenizer)
    if arguments.preamble:
        preamble += _preamble(tokenizer, arguments.preamble)
    text, recall = _trials(arguments, model, tokenizer, preamble)
    reports = [
        run_blend_gate(
            model,
            policy,
            ratios,
            text=text,
            recall=recall,
            codec=codec,
            limits=limits,
            preamble=preamble,
            passage_tokens=arguments.passage_tokens if text else 0,
            seed=arguments.seed,
            progress=progress,
        )
        for codec in [None, *lossy]
    ]
    print(table(reports))
    print(f"model {reports[0].fingerprint}")
    for report in reports:
        for record in report.records:
            print(f"{record.policy} {record.ratio:g}: {blend_records.save(record, directory)}")
    if arguments.json:
        Path(arguments.json).write_bytes(msgspec.json.format(msgspec.json.encode(reports), indent=1) + b"\n")
    return 0 if all(report.passed for report in reports) else 1


def table(reports: Sequence[BlendGateReport]) -> str:
    """The records for a person, one a line."""
    head = (
        "policy",
        "chunks",
        "ratio",
        "computed",
        "KL nats",
        "concat",
        "top-1",
        "recall",
        "full",
        "concat",
        "verdict",
    )
    rows: list[tuple[str, ...]] = [head]
    for record in (own for report in reports for own in report.records):
        m = record.metrics
        asked = [f"{value:.4f}" if m.recall_questions else "-" for value in (m.recall, m.recall_full, m.recall_concat)]
        rows.append(
            (record.policy, f"{record.codec} {record.level}" if record.codec else "exact", f"{record.ratio:g}",
             f"{m.token_share:.3f}", f"{m.kl_nats:.5f}", f"{m.kl_concat_nats:.5f}", f"{m.top1_agreement:.4f}", *asked,
             "FAIL: " + "; ".join(record.failures) if record.failures else "pass")
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--policy-settings is not JSON: {error}") from error
    if not isinstance(settings, dict) or "ratio" in settings:
        raise ConfigError("--policy-settings is not an object of settings besides the ratio; give that with --ratio")
    return settings


def _preamble(tokenizer: Any, path: str) -> list[int]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--preamble: {path} cannot be read: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _trials(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, preamble: list[int]
) -> tuple[list[BlendTrial], list[BlendTrial]]:
    from kvstore.connectors.blend.gate_trials import passage_trials, question_trials
    from kvstore.connectors.gate_inputs import text_ids
    from kvstore.connectors.gate_recall import load_recall

    positions_max, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    text: list[BlendTrial] = []
    if arguments.text:
        text = passage_trials(
            text_ids(tokenizer, arguments.text, arguments.tokens),
            preamble=preamble,
            tokens_max=arguments.tokens,
            passages=arguments.passages,
            passage_tokens=arguments.passage_tokens,
            query_tokens=arguments.query_tokens,
            following=arguments.following,
            seed=arguments.seed,
            positions_max=positions_max,
            vocabulary=vocabulary,
        )
    recall: list[BlendTrial] = []
    if arguments.recall:
        prompts = load_recall(arguments.recall, seed=arguments.seed, count=arguments.recall_prompts)
        recall = question_trials(prompts, positions_max=positions_max, vocabulary=vocabulary)
    return text, recall
