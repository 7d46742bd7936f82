"""Which way imports go (docs/architecture.md), read from every file's source, imports inside functions included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("unclip", "prior", "decoder", "upsamplers")
# A room, and all that it may import of this repository. What is not named here is the rest of `unclip`: it may all.
ALLOWED = {
    "unclip.core": {"unclip.core"},
    "unclip.clip": {"unclip.clip", "unclip.core"},
    "unclip.corpora": {"unclip.corpora", "unclip.core.data", "unclip.core.files"},
    "prior": {"prior", "unclip.clip", "unclip.core"},
    "decoder": {"decoder", "unclip.clip", "unclip.core"},
    "upsamplers": {"upsamplers", "unclip.core"},
}


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def imported(source: str) -> set[str]:
    """The repository's modules that a file imports; of `from a import b` it is a.b. Relative imports are not used."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write the whole name: this test reads no relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def modules() -> dict[str, Path]:
    """Every module of the four packages by its dotted name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def outside(room: str, names: set[str]) -> list[str]:
    return sorted(name for name in names if not any(within(name, allowed) for allowed in ALLOWED[room]))


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room: str):
    files = {name: path for name, path in modules().items() if within(name, room)}
    assert files
    wrong = {name: outside(room, imported(path.read_text())) for name, path in files.items()}
    assert not {name: found for name, found in wrong.items() if found}


def test_an_import_of_another_stage_would_be_seen():
    source = "def f():\n    from decoder import train\n    import unclip.pipeline\n    from unclip import UnCLIP\n"
    assert outside("prior", imported(source)) == ["decoder.train", "unclip.UnCLIP", "unclip.pipeline"]
    assert outside("prior", imported("from unclip.core.data import Draws\nimport prior.evaluate, json")) == []


def test_every_room_is_on_the_page():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for package in sorted({path.parent.relative_to(ROOT) for path in modules().values()}):
        assert f"{package.name}/" in page, package
