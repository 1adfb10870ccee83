"""docs/kill_matrix.md says what tests/chaos/matrix.py says, and every row of that is a test."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

TESTS = Path(__file__).parent
MATRIX = runpy.run_path(str(TESTS / "chaos" / "matrix.py"))


def names_in(path: Path) -> set[str]:
    """Functions and other names that a test file defines."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_the_page_is_what_the_matrix_says() -> None:
    assert (TESTS.parent / "docs" / "kill_matrix.md").read_text() == MATRIX["page"]()


def test_every_row_is_a_test() -> None:
    for row in MATRIX["ROWS"]:
        file, _, name = row.test.partition("::")
        assert name in names_in(TESTS / file), row.test


def test_every_event_that_is_tried_on_real_processes_has_a_row() -> None:
    tried = {name for name in names_in(TESTS / "test_chaos_events.py") if name.startswith("test_")}
    assert tried == {row.test.partition("::")[2] for row in MATRIX["ROWS"] if "test_chaos_events" in row.test}
