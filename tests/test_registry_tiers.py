"""Tier kinds by name."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kvstore.compose import open_store
from kvstore.config import Config, TierConfig
from kvstore.errors import ConfigError, TierError
from kvstore.tiers import registry
from kvstore.tiers.dram import DramTier
from kvstore.tiers.nvme import NvmeTier


def test_own_kinds_open(tmp_path: Path) -> None:
    assert {"dram", "nvme"} <= set(registry.available())
    tier = registry.open_tier("nvme", name="disk", capacity_bytes=1 << 20, path=str(tmp_path / "tier"), io_threads=2)
    assert isinstance(tier, NvmeTier)
    assert tier.name == "disk"
    tier.close()
    registry.open_tier("dram", name="memory", capacity_bytes=1 << 20).close()


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("nvm", {"path": "x"}, "did you mean 'nvme'"),
        ("floppy", {}, "use one of"),
        ("nvme", {}, "path is missing"),
        ("nvme", {"path": "x", "io_thread": 3}, "did you mean 'io_threads'"),
    ],
)
def test_mistakes_name_the_remedy(kind: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        registry.open_tier(kind, name="disk", capacity_bytes=1 << 20, **options)


def test_a_bad_option_value_is_a_config_error(tmp_path: Path) -> None:
    for options in ({"io_threads": 0}, {"piece_bytes": 5}):
        with pytest.raises(ConfigError, match="tiers.disk"):
            registry.open_tier("nvme", name="disk", capacity_bytes=1 << 20, path=tmp_path / "t", **options)
    with pytest.raises(TierError, match="at least"):
        registry.open_tier("nvme", name="disk", capacity_bytes=5, path=tmp_path / "t")
    registry.open_tier("nvme", name="disk", capacity_bytes=1 << 20, path=tmp_path / "t").close()


def test_options_that_are_text_are_read_as_what_the_tier_wants(tmp_path: Path) -> None:
    text = {"io_threads": "2", "direct_io": "False", "piece_bytes": "1MiB", "evict_ahead_bytes": "64KiB"}
    disk = registry.open_tier("nvme", name="disk", capacity_bytes=8 << 20, path=tmp_path / "t", **text)
    disk.close()
    text = {"huge_pages": "false", "bandwidth_gb_per_second": "2.5"}
    memory = registry.open_tier("dram", name="memory", capacity_bytes=2 << 20, **text)
    assert isinstance(memory, DramTier)
    assert memory.arena.pages == "base"
    memory.close()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("huge_pages", "maybe", "give true or false"),
        ("huge_pages", 1, "give true or false"),
        ("numa_node", "first", "give a whole number"),
        ("numa_node", True, "give a whole number"),
        ("bandwidth_gb_per_second", "fast", "give a number"),
        ("policy", 5, "give text"),
    ],
)
def test_an_option_of_another_type_is_named(option: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"tiers\.memory\.options\.{option} is .*; {words}"):
        registry.open_tier("dram", name="memory", capacity_bytes=1 << 20, **{option: value})


def test_an_option_cannot_be_what_the_tier_is_given_anyway() -> None:
    with pytest.raises(ConfigError, match=r"tiers.dram.options.capacity_bytes is no option; set tiers.dram.capacity"):
        open_store(Config(tiers={"dram": TierConfig(capacity="1MiB", options={"capacity_bytes": 5})}))


def test_a_package_can_add_a_kind_but_not_replace_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def entry_points(*, group: str) -> list[EntryPoint]:
        return [EntryPoint(name, "kvstore.tiers.nvme:NvmeTier", group) for name in ("tape", "dram")]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert registry.available() == ["dram", "hbm", "nvme", "tape"]
    tier = registry.open_tier("tape", name="tape", capacity_bytes=1 << 20, path=tmp_path)
    assert isinstance(tier, NvmeTier)
    tier.close()
    memory = registry.open_tier("dram", name="memory", capacity_bytes=1 << 20)
    assert not isinstance(memory, NvmeTier)
    memory.close()
