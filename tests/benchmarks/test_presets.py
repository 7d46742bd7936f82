"""Presets, bf16 and tiles of a tiny model."""

import json
from pathlib import Path

from benchmarks import presets


def test_a_tiny_model(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "presets.json"
    presets.main(["--model", str(tiny_model), "--pictures", "2", "--tiles", "64", "--json", str(path)])
    data = json.loads(path.read_text())
    rows = {(row["preset"], row["dtype"]): row for row in data["rows"]}
    assert list(rows) == [(preset, dtype) for preset in ("default", "fast") for dtype in ("fp32", "bf16")]
    assert rows["default", "fp32"]["time of default's"] == 1
    assert rows["fast", "fp32"]["PSNR to fp32"] is None and rows["fast", "bf16"]["PSNR to fp32"] > 0
    whole, tiled = data["tiles"]
    assert whole["tile"] == "whole" and tiled["tile"] == 64 and tiled["PSNR to the whole"] > 0
