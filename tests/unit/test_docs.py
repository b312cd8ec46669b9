# SPDX-License-Identifier: Apache-2.0
"""Pages that sources name exist, and what is generated in them is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.write_support_matrix import main

ROOT = Path(__file__).parents[2]
FOLDERS = ("kvserve", "policies", "tests", "scripts", "deploy", "docs")
KINDS = ("*.py", "*.md", "*.cpp", "*.h", "*.yaml", "*.sh")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_page_that_is_named_exists(folder: str) -> None:
    files = [path for kind in KINDS for path in (ROOT / folder).rglob(kind)]
    named = {
        (str(path.relative_to(ROOT)), page)
        for path in files
        for page in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text())
    }
    missing = [(path, page) for path, page in named if not (ROOT / page).exists()]
    assert missing == []


def test_the_table_of_what_is_served_is_as_generated() -> None:
    assert main(["--check"]) == 0
