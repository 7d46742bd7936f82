"""The whole stack from nothing in the shapes world, then judged by a program: `python -m recipes.shapes.run`.

Builds the corpus, trains all five networks, joins them, samples 400 captions and reads the pictures.
Everything goes to `runs/shapes`; `report.json` and `sheet.png` there are the result. At most 25 minutes on two cores
that have bf16. Where a goal is missed the command says so and ends with status 1.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from unclip.assemble import assemble
from unclip.core.files import write_json
from unclip.corpora import shapes
from unclip.evals.shapes_report import report

STAGES = {
    "clip": "unclip.clip.train",
    "prior": "prior.train",
    "decoder": "decoder.train",
    "upsampler_256": "upsamplers.train",
    "upsampler_1024": "upsamplers.train",
}
SCENES = {64: 5184, 256: 1296, 1024: 1296}  # every combination four times, or once
RECIPES = Path(__file__).parent
MINUTES = 25.0


def train_stage(stage: str, out: Path) -> None:
    """Trains one network by its own command, on the corpus of its size, to `out/<stage>`."""
    shutil.rmtree(out / stage, ignore_errors=True)
    size = stage.removeprefix("upsampler_") if stage.startswith("upsampler") else "64"
    command = [sys.executable, "-m", STAGES[stage], "--config", str(RECIPES / f"{stage}.yaml")]
    command += ["--train.out", str(out / stage), "--data.path", str(out / f"corpus-{size}")]
    if stage in ("prior", "decoder"):
        command += ["--clip", str(out / "clip" / "model")]
    subprocess.run(command, check=True)


def conclude(path: Path, minutes: dict[str, float]) -> None:
    """Adds the minutes of every step to the report at `path`, and to its goals those of time and of refusing.

    The program that reads pictures must refuse all that show no one shape. Raises SystemExit, a sentence and status 1,
    where a goal is missed.
    """
    figures: dict[str, Any] = json.loads(path.read_text())
    total, refused = round(sum(minutes.values()), 2), figures["refused"]
    fewest = min(refused["blank"], refused["broken"])
    goals = {**figures["goals"], "minutes": MINUTES, "refused": refused["of_each"]}
    reached = {**figures["reached"], "minutes": total <= MINUTES, "refused": fewest >= refused["of_each"]}
    write_json({**figures, "goals": goals, "reached": reached, "minutes": total, "minutes_of": minutes}, path)
    print(path)
    if missed := [name for name, well in reached.items() if not well]:
        sys.exit(
            f"error: the run missed its goals for {' and '.join(missed)}; compare them with the figures in {path}."
        )


def main() -> None:
    """Runs it all; `--from STAGE` goes on from there with what an earlier run left."""
    order = ["corpus", *STAGES, "report"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--from", dest="first", choices=order, default="corpus")
    arguments = parser.parse_args()
    out: Path = arguments.out
    times = out / "minutes.json"  # of every step, also of an earlier run's that this one goes on from
    minutes: dict[str, float] = json.loads(times.read_text()) if times.is_file() else {}
    for step in order[order.index(arguments.first) :]:
        before = time.monotonic()
        if step == "corpus":
            for size, count in SCENES.items():
                shapes.build(out / f"corpus-{size}", size, count=count, overwrite=True)
        elif step == "report":
            stages = {stage: out / stage for stage in STAGES}
            model = assemble(out / "model", **stages, presets=RECIPES / "presets.json")
            report(str(model), out / "corpus-64", out)
        else:
            train_stage(step, out)
        minutes[step] = round((time.monotonic() - before) / 60, 2)
        write_json(minutes, times)
        print(f"{step}: {minutes[step]} min", flush=True)
    conclude(out / "report.json", minutes)


if __name__ == "__main__":
    main()
