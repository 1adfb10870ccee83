"""The project about itself: what is public is documented, what is documented exists, files stay small."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import msgspec
import pytest

import kvstore
from kvstore.config import Config, ServiceConfig, TierConfig
from kvstore.store_settings import StoreSettings
from kvstore.tenants import TenantConfig

ROOT = Path(__file__).resolve().parents[1]
LINES_MAX = 400


def tracked(pattern: str) -> list[Path]:
    """Files of the project as git knows them."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", pattern]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_every_public_name_is_exported_and_documented() -> None:
    public = {name for name in vars(kvstore) if not name.startswith("_") or name == "__version__"}
    modules = {name for name in public if type(getattr(kvstore, name)).__name__ == "module"}
    assert sorted(public - modules) == sorted(kvstore.__all__)
    for name in kvstore.__all__:
        if name != "__version__":
            assert getattr(kvstore, name).__doc__, name


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    documented = set(re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)*)`", text))
    settings = {"log_level"}
    settings |= {f"tiers.NAME.{field}" for field in TierConfig.__struct_fields__}
    settings |= {f"store.{field}" for field in StoreSettings.__struct_fields__}
    settings |= {f"service.{field}" for field in ServiceConfig.__struct_fields__}
    settings |= {f"tenants.NAME.{field}" for field in TenantConfig.__struct_fields__}
    assert {name for name in documented if "." in name or name == "log_level"} == settings
    assert set(Config.__struct_fields__) == {"tiers", "store", "service", "tenants", "log_level"}


def test_defaults_in_the_documentation_are_the_defaults() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    for name, default in msgspec.to_builtins(ServiceConfig()).items():
        row = next(line for line in text.splitlines() if line.startswith("|") and f"`service.{name}`" in line)
        shown = row.split("|")[2].strip().strip("`")
        assert shown == (f"{default:g}" if isinstance(default, float) else str(default)), name


def test_files_stay_small() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for suffix in ("*.py", "*.cpp", "*.h")
        for path in tracked(suffix)
        if path.is_file() and (count := len(path.read_text().splitlines())) > LINES_MAX
    }
    assert not long, f"files over {LINES_MAX} lines: {long}"


def test_the_changelog_names_this_version() -> None:
    assert f"## {kvstore.__version__}" in (ROOT / "CHANGELOG.md").read_text()
