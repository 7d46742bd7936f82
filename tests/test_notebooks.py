"""The notebooks run from top to bottom, and are stored without outputs."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from unclip.folder import INDEX, WEIGHTS

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
PICTURES = {"latents.ipynb": 13, "sample.ipynb": 5}  # that each shows


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_stored_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs(path: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the embedded model where the package holds it, else on the tiny one."""
    if not (WEIGHTS / "emoji" / INDEX).is_file():
        monkeypatch.setenv("UNCLIP_MODEL", str(tiny_model))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this interpreter's kernel, not one of the user's
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == PICTURES[path.name]
    assert not list(tmp_path.iterdir())
