"""Whole or not at all: folders and files are written under another name, then renamed. Loads no torch.

And what does not load, in one sentence.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def replace_folder(partial: Path, final: Path) -> None:
    """Gives the folder `partial` the name `final`; a folder that had this name goes only once the new one is whole.

    With it goes what a process that was killed amid this left of earlier ones.
    """
    if final.exists():
        _remove_old(final)
        final.rename(final.with_name(f".{final.name}.{os.getpid()}.old"))  # a name that nobody gives their own folder
    partial.rename(final)
    _remove_old(final)


def _remove_old(final: Path) -> None:
    """Removes what a replacement of `final` has put aside, by this process or by one that was killed."""
    for old in final.parent.iterdir():
        if not re.fullmatch(rf"\.{re.escape(final.name)}\.\d+\.old", old.name):
            continue
        if old.is_symlink():
            old.unlink()  # what it leads to is not ours
        else:
            shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path, mark: str) -> None:
    """Raises FileExistsError where `folder` holds something, but not the file `mark`, which tells what is ours."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir()) and not (folder / mark).is_file()):
        raise FileExistsError(f"{folder} exists and holds no {mark}, so it stays; give a new folder or move it away.")


@contextmanager
def whole_folder(folder: Path, mark: str | None = None) -> Iterator[Path]:
    """Yields an empty `FOLDER.partial`; it takes the folder's name where the block ends well, and goes where not.

    mark: a file without which `folder` is not replaced, see `check_replaceable`.
    """
    if mark is not None:
        check_replaceable(folder, mark)
    partial = folder.with_name(folder.name + ".partial")
    with _folder_for(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            replace_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to, which then takes its place, or goes where an error comes.

    Makes the folder.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _folder_for(aside):
        try:
            yield aside
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def _folder_for(path: Path) -> Iterator[None]:
    """Makes the folders that lead to `path`; those it made go where the block fails and nothing else came into them."""
    made = [folder for folder in path.parents if not folder.exists()]  # innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def write_json(value: Any, path: Path) -> None:
    """Readable JSON, UTF-8, ending in a newline."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_text(path: Path) -> str:
    """A UTF-8 text, without the byte order mark that it may begin with. Raises ValueError where it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8.") from error


def read_lines(path: Path) -> list[str]:
    """What stands on the lines of a UTF-8 text, stripped, empty lines left out. Raises what `read_text` does."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


@contextmanager
def loading(folder: str | Path, kind: str) -> Iterator[None]:
    """Makes any error of the block a ValueError in one sentence that names the folder, and what it should hold."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have kinds of their own
        raise ValueError(f"{folder} does not load as {kind} ({one_line(error)}); fetch or make it again.") from error


def one_line(error: BaseException) -> str:
    """An error's first sentence without its full stop, at most 240 characters."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
    return text if len(text) <= 240 else text[:239] + "…"
