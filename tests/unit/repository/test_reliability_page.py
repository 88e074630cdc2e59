"""docs/reliability.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_each_row_names_a_test_that_exists() -> None:
    page, _, _ = (ROOT / "docs/reliability.md").read_text(encoding="utf-8").partition("\n## Chaos")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "test |" not in line]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert named, row
        for path, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), (path, test)
