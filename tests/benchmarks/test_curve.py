"""Quality against seconds, of a tiny model on a tiny corpus."""

import json
from pathlib import Path

from benchmarks import curve
from unclip.evals.concepts import evaluate


def test_a_row_at_the_preset_s_settings_is_what_evals_concepts_finds(
    tiny_model: Path, sized_corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "curve.json"
    options = ["--model", str(tiny_model), "--corpus", str(sized_corpus), "--dtype", "fp32", "--count", "8"]
    curve.main([*options, "--steps", "1", "4", "--pictures", "1", "--json", str(path)])
    rows = {(row["solver"], row["steps"]): row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == [("ddim", 1), ("ddim", 4), ("dpm++", 1), ("dpm++", 4)]
    assert all(row["seconds"] > 0 for row in rows.values())
    for split in curve.SPLITS:  # the tiny model's preset is dpm++ in four steps
        whole = evaluate(str(tiny_model), split, 8, None, sized_corpus)["over_ceiling"]["top5"]
        assert rows["dpm++", 4][f"top-5, {split}"] == whole
