"""The table of settings in docs/configuration.md. Run as a module, it writes the table."""

from __future__ import annotations

from pathlib import Path

from kvstore.specs import specs

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"
MARK = "<!-- written by `python -m tests.cli.configuration_doc` -->\n"


def table() -> str:
    rows = ["| setting | default | accepted | why |", "|---|---|---|---|"]
    rows += [f"| `{s.key}` | {s.default} | {s.accepts} | {s.reason} |" for s in specs()]
    return "\n".join(rows) + "\n"


def written() -> str:
    """The document as it should be."""
    prose, mark, _ = DOCUMENT.read_text().partition(MARK)
    return prose + mark + "\n" + table()


if __name__ == "__main__":
    DOCUMENT.write_text(written())
