"""The service benchmark runs, small, and measures what it says."""

from __future__ import annotations

from pathlib import Path

from kvstore.bench import service


def test_the_benchmark_runs_and_names_its_metrics(tmp_path: Path) -> None:
    metrics = service.measure(tmp_path, quick=True)
    assert set(metrics) == {
        f"service.{name}"
        for name in (
            "start_seconds",
            "put_gb_per_s",
            "shm_fetch_gb_per_s",
            "memcpy_gb_per_s",
            "shm_fetch_vs_memcpy",
            "lookup_p50_ms",
            "http_get_gb_per_s",
            "http_get_vs_socket",
            "http_get_vs_send",
            "bare_socket_gb_per_s",
            "bare_send_gb_per_s",
        )
    }
    assert all(value > 0 for value in metrics.values())
