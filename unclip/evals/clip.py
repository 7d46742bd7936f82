"""What a CLIP knows of a corpus's concepts by their names alone, and how well it finds captions and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unclip.clip.evaluate import evaluate as evaluate_split
from unclip.clip.model import CLIP
from unclip.core.data import DataConfig, ShardDataset
from unclip.core.files import write_json
from unclip.evals.concepts import trained_concepts
from unclip.evals.corpus import load_corpus

SPLITS = ("test-pair", "test-concept")


def evaluate(
    model: str | None,
    corpus: str | Path = "corpora/emoji-64",
    splits: Sequence[str] = SPLITS,
    templates: Sequence[str] = ("{}",),
    json_path: Path | None = None,
    device: str = "auto",
) -> dict[str, dict[str, float]]:
    """`unclip evals clip`: of each split the figures of `unclip.clip.evaluate`, also written to `json_path`.

    model: a model folder, a CLIP's folder or hub name; None: the embedded model. The labels are all concepts of the
    corpus. Where the folder has a `concepts.txt`, "SPLIT, known" has those drawings of the split that show one of them.
    templates: the prompts whose mean stands for a concept. Raises ValueError, FileNotFoundError.
    """
    from unclip.arguments import choose_device
    from unclip.folder import find_model

    if wrong := [template for template in templates if "{}" not in template]:
        raise ValueError(f"the template {wrong[0]!r} has no {{}}, which stands for the concept; give one that has.")
    own = model is not None and ("/" in model or Path(model).is_dir())  # a CLIP's folder or hub name is no model's
    folder = str(model if own else find_model(model)[0])
    labels = sorted({drawing.concept for drawing in load_corpus(corpus).drawings})
    data = {split: ShardDataset(DataConfig(str(corpus), split)) for split in splits}
    if known := trained_concepts(folder):
        for split in splits:
            if known & {meta["concept"] for meta in data[split].meta}:
                listed = str(Path(folder) / "concepts.txt")
                data[f"{split}, known"] = ShardDataset(DataConfig(str(corpus), split, concepts=listed))
    clip = CLIP.from_pretrained(folder).to(choose_device(device))
    figures = {name: evaluate_split(clip, dataset, labels, templates) for name, dataset in data.items()}
    figures = {name: {k: round(v, 4) for k, v in found.items()} for name, found in figures.items()}
    if json_path is not None:
        write_json(figures, json_path)
    return figures
