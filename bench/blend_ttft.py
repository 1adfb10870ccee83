"""Time to first token of a prompt of stored documents, blended, against computing it: 0.5B geometry, 8 x 512 tokens.

The documents come out of the daemon's memory, or, after kill -9 and a restart, from its disk, which is read with
O_DIRECT, so not from the page cache. Every blended run is paired with a full prefill just before it. The records of
the gates are made up: random weights have no quality, and only time is measured here.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from kvstore.bench.daemon import Daemon
from kvstore.bench.timing import median, seconds
from kvstore.bench.ttft import half_billion_model
from kvstore.client import Client
from kvstore.codecs import registry
from kvstore.connect import connect
from kvstore.connectors.blend.connector import BlendConnector
from kvstore.connectors.blend.outcomes import BlendedReport
from kvstore.connectors.blend.policies.recommended import Recommended
from kvstore.connectors.model_identity import identify
from kvstore.spans import Document
from kvstore.testing.blend_pass import blend_record, gate_record

PREAMBLE_TOKENS = 16
QUERY_TOKENS = 32
RATIO = 0.15
ROUNDS = 2
CODECS = ("lossless", "ladder")
WAYS = {"": True, "_unpipelined": False}


def measure(directory: Path, quick: bool) -> dict[str, float]:
    """`blend.ttft*` metrics; seconds, and ratios to a full prefill or to the pipelined run."""
    torch.manual_seed(0)
    model = half_billion_model(layers=2 if quick else 24)
    documents, tokens, rounds = (2, 64, 1) if quick else (8, 512, ROUNDS)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 150000, (1, PREAMBLE_TOKENS + documents * tokens + QUERY_TOKENS), generator=generator)
    starts = [PREAMBLE_TOKENS + number * tokens for number in range(documents)]
    spans = [Document(start, start + tokens) for start in starts]
    print(f"blend: {documents} documents of {tokens} tokens, {RATIO:.0%} computed again")
    took: defaultdict[str, list[float]] = defaultdict(list)
    shares: list[float] = []
    codecs = CODECS[:1] if quick else CODECS
    for codec in codecs:
        place = directory / f"blend-{codec}"
        place.mkdir()
        with Daemon(place, dram="1GiB", nvme="2GiB") as daemon:
            _rounds(daemon, model, ids, spans, codec, rounds, took, shares)
    metrics = {f"blend.ttft_{name}_seconds": median(own) for name, own in took.items() if not name.startswith("vs:")}
    metrics |= {f"blend.ttft_{name[3:]}": median(own) for name, own in took.items() if name.startswith("vs:")}
    worst = max(metrics[f"blend.ttft_{codec}_{tier}_vs_prefill"] for codec in codecs for tier in ("dram", "nvme"))
    return {**metrics, "blend.ttft_vs_prefill": worst, "blend.ttft_layer_share": median(shares)}


def _rounds(
    daemon: Daemon,
    model: Any,
    ids: torch.Tensor,
    spans: list[Document],
    codec: str,
    rounds: int,
    took: defaultdict[str, list[float]],
    shares: list[float],
) -> None:
    """Store the documents in one codec, and time every way of reading them against a prefill."""
    with daemon.start() as client:
        connector = _connector(model, client, ids, codec)
        for own in spans:
            stored = connector.store_document(ids[0, own.start : own.stop].numpy())
            assert not stored.failures, stored.detail
    _blended(daemon.url, model, ids, spans, codec, True)  # the first run of any shape is slower
    for _ in range(rounds):
        with torch.no_grad():
            full = seconds(lambda: model(ids, logits_to_keep=1))
        took["prefill"].append(full)
        for tier in ("nvme", "dram"):
            pipelined = 0.0
            for suffix, pipelines in WAYS.items():
                if tier == "nvme":
                    daemon.kill()
                    daemon.start().close()
                ttft, report = _blended(daemon.url, model, ids, spans, codec, pipelines)
                name = f"{codec}_{tier}{suffix}"
                took[name].append(ttft)
                took[f"vs:{name}_vs_prefill"].append(ttft / full)
                took[f"{name}_waited"].append(report.waited_ms / 1e3)
                took[f"{name}_load"].append(report.load_ms_content / 1e3)
                if pipelines:
                    pipelined = ttft
                else:
                    took[f"vs:{codec}_{tier}_pipelined_vs_unpipelined"].append(pipelined / ttft)
                shares.append(report.blend.layer_share if report.blend else 1.0)
                print(
                    f"  {name}: {ttft:.2f} s of {full:.2f} s, loaded in {report.load_ms_content / 1e3:.3f} s,"
                    f" waited {report.waited_ms / 1e3:.3f} s"
                )


def _blended(
    url: str, model: Any, ids: torch.Tensor, spans: list[Document], codec: str, pipelined: bool
) -> tuple[float, BlendedReport]:
    """Seconds until the logits, and the report, of a prompt over a new connection."""
    with connect(url) as client:
        connector = _connector(model, client, ids, codec, pipelined=pipelined)
        reports: list[BlendedReport] = []
        took = seconds(lambda: reports.append(connector.prefill(ids, documents=spans)[2]))
    (report,) = reports
    assert report.blend is not None, report.spans
    assert report.blend.moved_tokens == sum(span.stop - span.start for span in spans)
    return took, report


def _connector(model: Any, client: Client, ids: torch.Tensor, codec: str, *, pipelined: bool = True) -> BlendConnector:
    policy = Recommended(ratio=RATIO)
    spec, fingerprint = identify(model)
    own = registry.get(codec)
    level = max(plan.level for plan in own.plan(spec, 256))
    lossy = None if own.exact else own
    records = [blend_record(fingerprint, policy), blend_record(fingerprint, policy, codec=lossy, level=level)]
    return BlendConnector(
        model,
        client,
        preamble=ids[0, :PREAMBLE_TOKENS].numpy(),
        policy=policy,
        blend_gates=records,
        gates=[] if lossy is None else [gate_record(fingerprint, lossy, level)],
        codec=codec,
        durable=True,
        pipelined=pipelined,
        load_policy="always",
    )
