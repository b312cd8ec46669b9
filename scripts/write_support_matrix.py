# SPDX-License-Identifier: Apache-2.0
"""Write the table of docs/models.md that says what is served of which models.

python -m scripts.write_support_matrix [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.engine.support import COLUMNS, rows

PAGE = Path(__file__).parents[1] / "docs/models.md"
_FIRST, _LAST = "<!-- support -->\n", "<!-- /support -->"


def written(page: str) -> str:
    """Return the page with its table as it should be."""
    before, _, rest = page.partition(_FIRST)
    _, _, after = rest.partition(_LAST)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows()]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{before}{_FIRST}{table}{_LAST}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    page = PAGE.read_text()
    if check:
        if page != written(page):
            print(f"{PAGE}: run python -m scripts.write_support_matrix")
        return int(page != written(page))
    PAGE.write_text(written(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
