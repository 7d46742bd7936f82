"""Writes the tables of docs/performance.md from the files that its commands wrote.

    python -m benchmarks.page

Below each block of commands that names a file by `--json`, the tables are replaced by that file's, where it is there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks import presets, sampling
from unclip.core.files import whole_file

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
# a block of commands, the file it writes, and the tables or the sentence in their place
BLOCK = re.compile(r"(```bash\n[^`]*--json (docs/results/\S+)\n```\n\n)((?:\|.*\n|\n(?=\|)|Not measured yet\.\n)+)")


def tables(path: Path) -> str:
    """A results file's tables in Markdown."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if "tiles" in data:
        return f"{presets.table(data['rows'])}\n\n{presets.table(data['tiles'])}\n"
    if "solvers" in data["options"]:
        return f"{presets.table(data['rows'])}\n"
    return sampling.table([sampling.Row(**row) for row in data["rows"]]) + "\n"


def written(page: str) -> str:
    """The page with the tables of all files that are there."""

    def fill(found: re.Match[str]) -> str:
        path = ROOT / found[2]
        return found[1] + (tables(path) if path.is_file() else found[3])

    return BLOCK.sub(fill, page)


def main() -> None:
    """The command."""
    text = written(PAGE.read_text(encoding="utf-8"))
    with whole_file(PAGE) as partial:
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
