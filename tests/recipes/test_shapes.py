"""The run of the shapes world: what its report says beside what was read off the pictures."""

import json
from pathlib import Path

import pytest

from recipes.shapes.run import conclude
from unclip.core.files import write_json

MINUTES = {"clip": 5.7, "decoder": 17.2}


def write_report(folder: Path, blank: int = 40, broken: int = 40, seen: bool = True) -> Path:
    figures = {
        "refused": {"blank": blank, "broken": broken, "of_each": 40, "generated": 3},
        "goals": {"seen": 0.85, "real": 0.98},
        "reached": {"seen": seen, "real": True},
    }
    write_json(figures, folder / "report.json")
    return folder / "report.json"


def test_time_and_refusals_are_goals_too(tmp_path: Path) -> None:
    path = write_report(tmp_path)
    conclude(path, MINUTES)
    figures = json.loads(path.read_text())
    assert figures["goals"] == {"seen": 0.85, "real": 0.98, "minutes": 25, "refused": 40}
    assert figures["reached"] == dict.fromkeys(figures["goals"], True)
    assert (figures["minutes"], figures["minutes_of"]) == (22.9, MINUTES)


@pytest.mark.parametrize(
    ("change", "minutes", "missed"),
    [
        ({}, {"decoder": 25.01}, ["minutes"]),
        ({"broken": 39}, MINUTES, ["refused"]),
        ({"blank": 0, "seen": False}, {"decoder": 30.0}, ["seen", "minutes", "refused"]),
    ],
)
def test_what_was_missed_is_named_and_reported(tmp_path: Path, change, minutes: dict[str, float], missed) -> None:
    path = write_report(tmp_path, **change)
    with pytest.raises(SystemExit) as caught:
        conclude(path, minutes)
    assert str(caught.value.code).startswith(f"error: the run missed its goals for {' and '.join(missed)}; ")
    assert [name for name, well in json.loads(path.read_text())["reached"].items() if not well] == missed
