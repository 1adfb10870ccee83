"""`kvstore gate`: measure what codecs, or blending, do to a model, judge it, record it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvstore import gate, gate_records, record_files
from kvstore.commands import gate_blend
from kvstore.commands.limits import limits_of
from kvstore.config import unknown_name
from kvstore.errors import ConfigError, ContainerError
from kvstore.keys import DEFAULT_CHUNK_TOKENS, ROOT
from kvstore.outcome import Reason

if TYPE_CHECKING:
    from kvstore.codec import Codec
    from kvstore.connectors.gate import GateReport
    from kvstore.connectors.gate_trials import Trial

SUMMARY = "measure what lossy codecs, or blending, do to a model and record what passes; exit code 1 if nothing does"

TOKENS_DEFAULT = 16384
FOLLOWING_DEFAULT = 256
RECALL_PROMPTS_DEFAULT = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    parser.add_argument("--model", required=True, metavar="PATH", help="directory of a transformers model")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="held-out text: none that calibrated it")
    parser.add_argument("--recall", metavar="FILE", help="recall prompts: JSON lines, or Python with recall_prompts()")
    parser.add_argument("--profile", metavar="FILE", help="calibrated profile of the codecs")
    parser.add_argument(
        "--codecs", metavar="NAMES", help="comma-separated; default: all lossy ones, those of a profile"
    )
    parser.add_argument("--purpose", default="standard", metavar="NAME", help=f"limits: {', '.join(gate.PURPOSES)}")
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE", help="one limit set otherwise")
    parser.add_argument("--tokens", type=int, default=TOKENS_DEFAULT, help="text to use at most (default %(default)s)")
    parser.add_argument(
        "--following",
        type=int,
        help=f"tokens scored behind a prompt (default {FOLLOWING_DEFAULT}, blending {gate_blend.FOLLOWING_DEFAULT})",
    )
    parser.add_argument(
        "--recall-prompts",
        type=int,
        default=RECALL_PROMPTS_DEFAULT,
        help="prompts to use at most (default %(default)s)",
    )
    parser.add_argument("--chunk-tokens", type=int, default=DEFAULT_CHUNK_TOKENS, help="default %(default)s")
    parser.add_argument("--dtype", default="auto", help="float32, float16 or bfloat16; default: the checkpoint's")
    parser.add_argument("--device", default="cpu", help="where to run the model (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of text and prompts")
    parser.add_argument(
        "--out", metavar="DIR", help="where records go; default: beside the profile, or the first of KVSTORE_PROFILES"
    )
    parser.add_argument("--json", metavar="FILE", help="write the whole report there")
    gate_blend.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, write records and report; 0, or 1 if a codec passes at no level."""
    if not (arguments.text or arguments.recall):
        raise ConfigError("give --text FILE... (held-out text), --recall FILE, or both")
    if arguments.following is None:
        arguments.following = gate_blend.FOLLOWING_DEFAULT if arguments.blend else FOLLOWING_DEFAULT
    for flag, low in (("tokens", 1), ("following", 1), ("recall_prompts", 1), ("chunk_tokens", 1), ("seed", 0)):
        if getattr(arguments, flag) < low:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(arguments, flag)}; give at least {low}")
    limits = gate.STANDARD if arguments.blend else limits_of(gate.PURPOSES, arguments.purpose, arguments.limit)
    directory = _directory(arguments.out, arguments.profile)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--out: {directory} is not a directory")
    if arguments.json and not Path(arguments.json).resolve().parent.is_dir():
        raise ConfigError(f"--json: there is no directory {Path(arguments.json).resolve().parent}")
    if arguments.json and Path(arguments.json).is_dir():
        raise ConfigError(f"--json: {arguments.json} is a directory; name a file")
    if not arguments.blend and (given := gate_blend.given(arguments)):
        raise ConfigError(f"{given} is for --blend; give that too, or leave it out")
    codecs = [] if arguments.blend else _codecs(arguments.codecs, arguments.profile)
    if "torch" not in sys.modules:  # its threads spin while they wait, which on busy cores takes many times as long
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from kvstore.connectors.gate import run_gate
        from kvstore.connectors.gate_inputs import load_model
    except ImportError as error:
        raise ConfigError(
            f"kvstore gate needs torch and transformers: pip install 'kvstore-tiered[torch]' ({error})"
        ) from error

    if arguments.blend:
        return gate_blend.run(arguments, directory, lambda: _codecs(arguments.codecs, arguments.profile), _progress)
    model = load_model(arguments.model, arguments.dtype, arguments.device)
    text, recall = _trials(arguments, model)
    report = run_gate(
        model,
        codecs,
        text=text,
        recall=recall,
        limits=limits,
        chunk_tokens=arguments.chunk_tokens,
        seed=arguments.seed,
        progress=_progress,
    )
    print(table(report))
    for record in report.records:
        print(f"{record.codec}: {gate_records.save(record, directory)}")
    if arguments.json:
        Path(arguments.json).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return 1 if report.refused else 0


def table(report: GateReport) -> str:
    """The report's levels for a person, one a line."""
    head = ("codec", "level", "bits", "K err", "V err", "attn err", "KL nats", "top-1", "ppl %", "recall pt", "verdict")
    rows = [head]
    for own in report.levels:
        m = own.result.metrics
        recall = f"{0 - own.recall_drop_points:+.2f}" if m.recall_questions else "-"
        verdict = (
            "exact" if own.exact else ("FAIL: " + "; ".join(own.result.failures) if own.result.failures else "pass")
        )
        rows.append(
            (own.codec, str(own.level), f"{m.bits_per_element:.3f}", f"{m.key_error:.4f}", f"{m.value_error:.4f}",
             f"{m.attention_error:.4f}", f"{m.kl_nats:.5f}", f"{m.top1_agreement:.4f}",
             f"{own.perplexity_change_percent:+.3f}", recall, verdict)
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


def _directory(out: str | None, profile: str | None) -> Path:
    """Where records go. Raises ConfigError, before anything is measured, if nothing says where."""
    if out is not None:
        return Path(out)
    if profile is not None:
        return Path(profile).resolve().parent
    if places := record_files.directories():
        return places[0]
    raise ConfigError("say where records go: --out DIR, or set KVSTORE_PROFILES to the directory of profiles")


def _codecs(names: str | None, profile_file: str | None) -> list[Codec]:
    """The codecs to measure, with the profile where they have tables in it."""
    from kvstore.codecs import profiles, registry

    profile = ROOT
    if profile_file is not None:
        try:
            loaded = profiles.load(profile_file)
            profiles.add(loaded)
        except ContainerError as error:
            raise ConfigError(f"--profile: {error.detail}") from error
        profile = loaded.id
    wanted = registry.available() if names is None else tuple(dict.fromkeys(map(str.strip, names.split(","))))
    codecs = []
    for name in wanted:
        if name not in registry.available():
            raise unknown_name("codec", name, registry.available(), "--codecs")
        codec = _codec(name, profile, asked_for=names is not None)
        if codec is not None and (names is not None or not codec.exact):
            codecs.append(codec)
    if not codecs:
        raise ConfigError("--codecs: the profile has tables for no codec of this installation")
    return codecs


def _codec(name: str, profile: bytes, *, asked_for: bool) -> Codec | None:
    """A codec with its profile; if it has no tables there, without one if it was asked for, else None."""
    from kvstore.codecs import registry

    try:
        return registry.get(name, profile)
    except ContainerError as error:
        if profile != ROOT and error.reason == Reason.UNKNOWN_PROFILE:
            return _codec(name, ROOT, asked_for=True) if asked_for else None
        raise ConfigError(f"--codecs {name}: {error.detail}") from error


def _trials(arguments: argparse.Namespace, model: Any) -> tuple[list[Trial], list[Trial]]:
    from kvstore.connectors.gate_inputs import load_tokenizer, start_ids, text_ids
    from kvstore.connectors.gate_recall import load_recall
    from kvstore.connectors.gate_trials import recall_trials, text_trials

    text: list[Trial] = []
    if arguments.text:
        tokenizer = load_tokenizer(arguments.model)
        text = text_trials(
            text_ids(tokenizer, arguments.text, arguments.tokens),
            start=start_ids(tokenizer),
            tokens_max=arguments.tokens,
            chunk_tokens=arguments.chunk_tokens,
            following=arguments.following,
            seed=arguments.seed,
            positions_max=model.config.max_position_embeddings,
            vocabulary=model.config.vocab_size,
        )
    recall: list[Trial] = []
    if arguments.recall:
        prompts = load_recall(arguments.recall, seed=arguments.seed, count=arguments.recall_prompts)
        recall = recall_trials(
            prompts,
            together=getattr(model.config, "sliding_window", None) is None,
            vocabulary=model.config.vocab_size,
        )
    return text, recall


def _progress(done: int, total: int) -> None:
    step = max(1, total // 10)
    if done % step == 0 or done == total:
        print(f"gate: {done} of {total} prompts", file=sys.stderr, flush=True)
