"""docs/performance.md has the tables of the files that its commands wrote."""

import re

import pytest

from benchmarks import curve, page, presets, sampling

TEXT = page.PAGE.read_text(encoding="utf-8")
COMMANDS = re.findall(r"--json (docs/results/\S+)", TEXT)


def test_page_and_files_agree() -> None:
    assert page.written(TEXT) == TEXT


def test_every_command_has_a_place_for_its_tables_and_every_file_a_command() -> None:
    assert [found[2] for found in page.BLOCK.finditer(TEXT)] == COMMANDS
    files = (page.ROOT / "docs" / "results").glob("performance-*.json")
    assert {str(path.relative_to(page.ROOT)) for path in files} <= set(COMMANDS)


@pytest.mark.parametrize("module", [sampling, presets, curve])
def test_commands_parse(module) -> None:
    found = re.findall(rf"^python -m {re.escape(module.__name__)} ((?:.*\\\n)*.*)$", TEXT, re.M)
    assert found
    for words in found:
        assert module.parser().parse_args(words.replace("\\\n", " ").split()).json
