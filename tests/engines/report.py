"""A pytest plugin that writes what became of each test, for the conformance table in the documentation.

    pytest -p tests.engines.report --outcomes FILE

appends to FILE one JSON object a line: {"group": the test file's name without "test_", "test": name with parameters,
"outcome": "passed", "failed" or "skipped"}. A test that fails before or after its body has failed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

OPTION = "--outcomes"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option with the file's name."""
    parser.addoption(OPTION, type=Path, default=None, help="append each test's outcome to this file, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    """Write only if there is a file to write to."""
    path: Path | None = config.getoption(OPTION)
    if path is not None:
        config.pluginmanager.register(Outcomes(path), "kvstore-outcomes")


class Outcomes:
    """Collects the worst outcome of each test's three phases, and appends them to `path` at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take note of one phase of one test."""
        if self._outcomes.get(report.nodeid, "passed") == "passed":
            self._outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        """Append everything."""
        with self._path.open("a", encoding="utf-8") as file:
            for test, outcome in self._outcomes.items():
                module, _, name = test.partition("::")
                line = {"group": Path(module).stem.removeprefix("test_"), "test": name, "outcome": outcome}
                print(json.dumps(line), file=file)
