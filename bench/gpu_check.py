"""`make gpu-check`: everything that needs a GPU, in one table; exit code 1 if a check fails, 2 if there is no GPU here.

A check is a function that returns what it measured, as text, or raises. Modules that have some list them in CHECKS.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

import kvstore
from kvstore.bench import gpu_hbm, gpu_ladder, gpu_r32
from kvstore.connectors.transformers import TransformersConnector
from kvstore.testing.models import FAMILIES, random_model

Check = tuple[str, Callable[[], str]]


def device() -> str:
    """Which GPU, and how fast it copies from pinned memory."""
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    on_gpu = torch.empty_like(host, device="cuda")
    on_gpu.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        on_gpu.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    rate = 10 * host.nbytes / (time.perf_counter() - started) / 1e9
    return f"{torch.cuda.get_device_name()}, {rate:.1f} GB/s from pinned memory"


def connector_is_exact() -> str:
    """Greedy tokens and logits on the GPU equal those without a store, for every family, fp32 and bf16."""
    worst = max(_connector_error(family, dtype) for family in FAMILIES for dtype in (torch.float32, torch.bfloat16))
    assert worst <= 1e-3, f"logits differ by {worst}"
    return f"{len(FAMILIES)} families, fp32 logits within {worst:.1e}"


def _connector_error(family: str, dtype: torch.dtype) -> float:
    """Largest fp32 difference of the logits with and without a store (0 for bf16, which rounds by what it reuses)."""
    model = random_model(family, dtype=dtype).to("cuda")
    prompt = torch.randint(0, 200, (1, 700), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    exact = dtype == torch.float32
    reference = model.generate(prompt, max_new_tokens=16, do_sample=False)
    with kvstore.connect("embedded:?dram=256MiB") as client:
        for _ in range(2):
            connector = TransformersConnector(model, client, chunk_tokens=64)
            sequences, reports = connector.generate(prompt, max_new_tokens=16, do_sample=False)
            assert not exact or torch.equal(sequences, reference), f"{family} {dtype}: tokens differ"
        assert reports[0].reused_tokens >= 600, f"{family} {dtype}: {reports[0].reused_tokens} tokens reused"
        _, logits, _ = connector.prefill(prompt)
    with torch.no_grad():
        expected = model(prompt, logits_to_keep=1).logits[:, -1]
    return float((logits - expected).abs().max()) if exact else 0.0


CHECKS: list[Check] = [
    ("device", device),
    ("transformers connector", connector_is_exact),
    *gpu_r32.checks(),
    *gpu_ladder.checks(),
    *gpu_hbm.checks(),
]


def main() -> int:
    """Run every check; answers the exit code."""
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA GPU and a torch built for it; none is available here", file=sys.stderr)
        return 2
    failed = 0
    for name, check in CHECKS:
        try:
            outcome, detail = "ok", check()
        except Exception as error:
            outcome, detail = "FAILED", f"{type(error).__name__}: {error}"
            failed += 1
        print(f"{name:32s} {outcome:8s} {detail}", flush=True)
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
