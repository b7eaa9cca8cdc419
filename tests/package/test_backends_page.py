"""The tables of docs/backends.md are those of the backends and the op table."""

from __future__ import annotations

from backends_page import END, PAGE, START, tables


def test_page_is_up_to_date() -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    assert rest.partition(END)[0] == tables(), "run: python tests/support/backends_page.py"
