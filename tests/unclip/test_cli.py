"""The command line: what it prints and writes, and that bad input costs one sentence and no file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unclip.cli import main
from unclip.evals.sheets import CAPTIONS, read_captions
from unclip.pictures import columns_of, grid, groups, read_chunks, slug, write_png


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command line in an empty folder: (exit status, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, list[str], str]:
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out.splitlines(), err

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


CPU = ("--device", "cpu", "--dtype", "fp32")


def sample(model: Path, *more: object) -> tuple[object, ...]:
    return ("sample", "--model", model, *CPU, *more)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import unclip; unclip.__version__; dir(unclip)", 0),
        ("from unclip.cli import main; main(['--help'])", 0),
        ("from unclip.cli import main; main(['sample', ''])", 2),
        ("from unclip.cli import main; main(['sample', 'a pear', ' '])", 2),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code: str, status: int) -> None:
    check = (
        "import atexit, sys\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'accelerate'}\n"
        "atexit.register(lambda: print('LOADED', sorted(heavy & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert done.stderr == ("unclip: a prompt is empty; say what to draw.\n" if status else "")


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    import unclip

    with pytest.raises(AttributeError, match="no attribute 'Unclip'"):
        unclip.Unclip  # noqa: B018


def test_sample_writes_pictures_that_say_what_they_are(run, tiny_model: Path, tmp_path: Path) -> None:
    command = sample(tiny_model, "A red apple, glossy 3D!", "--num-images", 2, "--seed", 3, "--out", "drawn")
    status, out, err = run(*command)
    assert status == 0, err
    assert out == ["drawn/a-red-apple-glossy-3d-3.png", "drawn/a-red-apple-glossy-3d-4.png"]
    assert all(stage in err for stage in ("prior", "decoder", "upsampler_256", "upsampler_1024"))
    with Image.open(out[-1]) as image:
        assert image.size == (256, 256)
        assert image.mode == "RGB"
    chunks = read_chunks(Path(out[-1]))
    assert chunks is not None
    assert (chunks["prompt"], chunks["seed"], chunks["model"]) == ("A red apple, glossy 3D!", "4", "tiny")
    assert '"preset": "default"' in chunks["settings"]
    first = files(tmp_path)
    assert run(*command)[0] == 0
    assert files(tmp_path) == first


def test_prompts_of_one_name_and_other_settings_overwrite_nothing(run, tiny_model: Path, tmp_path: Path) -> None:
    status, out, err = run(*sample(tiny_model, "a red apple", "a red apple!", "--size", 16))
    assert status == 0, err
    assert out[0] == "pictures/a-red-apple-0.png"
    assert len(set(out)) == 2
    before = files(tmp_path)
    status, again, _ = run(*sample(tiny_model, "a red apple", "--size", 16, "--guidance", 1))
    assert status == 0
    assert again[-1] not in out
    assert before.items() < files(tmp_path).items()


def test_models_of_one_name_overwrite_nothing(run, tiny_model: Path, tmp_path: Path) -> None:
    for place in ("a", "b", "elsewhere"):
        shutil.copytree(tiny_model, tmp_path / place / "tiny")
    weights = tmp_path / "b" / "tiny" / "decoder" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    arguments = ("a pear", "--size", 16, "--grid")
    assert run(*sample(tmp_path / "a" / "tiny", *arguments))[0] == 0
    first = files(tmp_path / "pictures")
    assert run(*sample(tmp_path / "elsewhere" / "tiny", *arguments))[0] == 0
    assert files(tmp_path / "pictures") == first
    assert run(*sample(tmp_path / "b" / "tiny", *arguments))[0] == 0
    both = files(tmp_path / "pictures")
    assert first.items() < both.items()
    assert len(both) == 4


@pytest.mark.parametrize("more", [("--best-of", 2), ("--tile", 32)])
def test_a_sheet_of_other_settings_overwrites_nothing(run, tiny_model: Path, tmp_path: Path, more) -> None:
    arguments = ("a pear", "--size", 64, "--grid")
    assert run(*sample(tiny_model, *arguments))[0] == 0
    before = files(tmp_path)
    status, out, err = run(*sample(tiny_model, *arguments, *more))
    assert status == 0, err
    assert before.items() < files(tmp_path).items()
    chunks = read_chunks(Path(out[-1])) or {}
    said = {**json.loads(chunks["settings"]), **chunks}
    assert str(said[more[0].removeprefix("--").replace("-", "_")]) == str(more[1])


def test_prompts_from_a_file_and_a_grid(run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("two stars\n\nein grüner Apfel 🍏\n", encoding="utf-8")
    status, out, err = run(
        *sample(tiny_model, "a pear", "--from-file", "prompts.txt", "--num-images", 3, "--size", 16, "--grid")
    )
    assert status == 0, err
    assert len(out) == 10
    assert "pictures/ein-grüner-apfel-0.png" in out
    assert out[-1] == "pictures/a-pear-grid-0.png"
    with Image.open(out[-1]) as sheet, Image.open(out[4]) as one:
        assert sheet.size == (16 * 3 + 16, 16 * 3 + 16)
        assert list(sheet.crop((24, 24, 40, 40)).getdata()) == list(one.getdata())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no prompt came"),
        ([""], "prompt is empty"),
        (["x", "--num-images", "0"], "num_images is 0"),
        (["x", "--seed", "-1"], "seed is -1"),
        (["x", "--size", "100"], "size 100 is not offered"),
        (["x", "--preset", "best"], "preset 'best' is unknown"),
        (["x", "--guidance", "-2"], "guidance scale is -2"),
        (["x", "--from-file", "nowhere.txt"], "nowhere.txt is no file"),
        (["x", "--model", "nowhere"], "there is no model 'nowhere'"),
        (["x", "--dtype", "int8"], "int8"),
        (["x", "--device", "abacus"], "abacus"),
        (["x", "--colour", "red"], "--colour"),
        (["x", "--out", "taken"], "is a file"),
        (["x", "--out", "taken/sub/folder"], "taken does not allow it"),
        (["x", "--from-file", "."], ". is no file"),
    ],
)
def test_bad_input_is_one_sentence_and_no_file(run, tiny_model: Path, tmp_path: Path, arguments, says: str) -> None:
    (tmp_path / "taken").write_text("mine")
    model = [] if "--model" in arguments else ["--model", tiny_model]
    status, out, err = run("sample", *arguments, *model)
    assert status == 2
    assert says in err
    assert "Traceback" not in err
    assert not out
    assert files(tmp_path) == {"taken": b"mine"}


def test_many_pictures_are_drawn_a_few_at_a_time_and_stay_the_same(run, tiny_model, monkeypatch) -> None:
    command = sample(tiny_model, "a pear", "a fig", "--num-images", 5, "--seed", 2, "--size", 16, "--grid")
    status, whole, err = run(*command, "--out", "whole")
    assert status == 0, err
    monkeypatch.setattr("unclip.pictures.AT_ONCE", 2)
    status, parts, err = run(*command, "--out", "parts")
    assert status == 0, err
    assert [path.removeprefix("parts/") for path in parts] == [path.removeprefix("whole/") for path in whole]
    for one, other in zip(whole, parts, strict=True):
        assert read_chunks(Path(one)) == read_chunks(Path(other))
        with Image.open(one) as a, Image.open(other) as b:
            assert (np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)) <= 1).mean() >= 0.999


@pytest.mark.parametrize(("prompts", "num_images"), [(1, 1), (1, 500), (3, 9), (20, 1), (5, 3), (2, 8)])
def test_groups_hold_every_picture_once_in_order(prompts: int, num_images: int) -> None:
    found, given = [], [str(i) for i in range(prompts)]
    for batch, first, count in groups(given, num_images):
        assert 0 < len(batch) * count <= 8
        found += [(prompt, first + i) for prompt in batch for i in range(count)]
    assert found == [(prompt, i) for prompt in given for i in range(num_images)]


def test_interruption_keeps_what_is_done_and_no_half_file(run, tiny_model, tmp_path, monkeypatch) -> None:
    saved = Image.Image.save

    def interrupted(self, *arguments, **options):
        if len(list(tmp_path.rglob("*.png"))) == 1:
            Path(arguments[0]).write_bytes(b"half")
            raise KeyboardInterrupt
        saved(self, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    status, out, err = run(*sample(tiny_model, "a pear", "--num-images", 3, "--size", 16))
    assert status == 130
    assert out == ["pictures/a-pear-0.png"]
    assert "interrupted" in err
    assert list(files(tmp_path)) == out


def test_want_of_memory_is_one_sentence(run, tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    def too_large(self, *_, **__):
        return torch.empty(2**60)  # what a CPU says; the other is what CUDA does

    def too_large_for_cuda(self, *_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    for decode in (too_large, too_large_for_cuda):
        monkeypatch.setattr("unclip.pipeline.UnCLIP.decode", decode)
        status, out, err = run(*sample(tiny_model, "a pear", "--size", 16))
        assert (status, out) == (1, [])
        assert err.splitlines()[-1].startswith("unclip: memory ran out; ask for a smaller --size")
        assert not files(tmp_path)


def test_an_error_of_our_own_is_no_sentence(run, tiny_model: Path, monkeypatch) -> None:
    def broken(self, *_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("unclip.pipeline.UnCLIP.decode", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        main([str(a) for a in sample(tiny_model, "a pear", "--size", 16)])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"eta": "much"}, "eta is 'much'"),
        ({"solver": 3}, "solver is 3"),
        ({"options": {"clip_sample_range": [1]}}, "'list'"),  # a TypeError from deep within
    ],
)
def test_a_model_with_a_wrong_setting_is_one_sentence(run, copy_model, tmp_path: Path, setting, says: str) -> None:
    index = copy_model() / "model_index.json"
    content = json.loads(index.read_text())
    content["presets"]["default"]["decoder"] |= setting
    index.write_text(json.dumps(content))
    status, out, err = run(*sample(index.parent, "a pear", "--size", 16))
    assert (status, out) == (2, [])
    sentence = err.splitlines()[-1]  # below the bars
    assert sentence.startswith("unclip: ") and says in sentence and "Traceback" not in err
    assert not list(tmp_path.glob("pictures/*"))


def test_the_fixed_captions_are_found_from_any_folder(run, tiny_model: Path, tmp_path: Path) -> None:
    status, out, err = run("evals", "sheet", "--model", tiny_model, "--size", 16, "--out", "sheet.png", *CPU)
    assert (status, out) == (0, ["sheet.png"]), err
    assert len(read_captions(CAPTIONS)) == 48
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 8 * 16 and sheet.height > 6 * 16
    status, out, err = run("evals", "sheet", "--captions", "nowhere.txt", "--out", "b.png", "--model", tiny_model)
    assert (status, out) == (2, [])
    assert "list of captions nowhere.txt" in err


def test_a_long_prompt_is_a_warning(run, tiny_model: Path) -> None:
    status, _, err = run(*sample(tiny_model, "a red apple " * 20 + "zebra", "--size", 16))
    assert status == 0
    assert [line for line in err.splitlines() if line.startswith("warning: ") and "zebra" in line]


def test_a_warning_is_not_pages_long(run, tiny_model: Path) -> None:
    status, _, err = run(*sample(tiny_model, "zebra" * 2000, "--size", 16))
    assert status == 0
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "cut from it" in warning
    assert len(warning) < 500


def test_a_file_of_prompts_may_begin_with_a_byte_order_mark(run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa pear\r\n\r\na fig\r\n")
    status, out, err = run(*sample(tiny_model, "--from-file", "prompts.txt", "--size", 16))
    assert status == 0, err
    assert [(read_chunks(Path(path)) or {})["prompt"] for path in out] == ["a pear", "a fig"]


@pytest.mark.parametrize(
    "command",
    [
        ("evals", "concepts", "--json", "taken/figures.json"),
        ("evals", "concepts", "--sheet", "."),
        ("evals", "shapes", "--out", "taken"),
        ("evals", "sheet", "--out", "taken/sheet.png"),
    ],
)
def test_where_results_go_is_checked_before_they_are_made(run, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "taken").write_text("mine")
    status, out, err = run(*command)
    assert (status, out) == (2, [])
    assert f"{command[-2]} {command[-1]}" in err
    assert files(tmp_path) == {"taken": b"mine"}


def test_version(run) -> None:
    from unclip import __version__

    assert run("--version") == (0, [f"unclip {__version__}"], "")


def test_corpora_from_the_command_line(run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "mine" / "a.png")
    (tmp_path / "mine" / "a.txt").write_text("a red field")
    status, out, err = run("pack", "mine", "packed", "--size", 16)
    assert (status, out) == (0, ["packed"]), err
    assert (tmp_path / "packed" / "dataset.json").is_file()
    status, out, err = run("pack", "mine", "packed", "--size", 16)
    assert (status, out) == (2, [])
    assert err.startswith("unclip: ")
    for command in (("pack", "nowhere", "x"), ("corpus", "shapes", "--out", "x", "--size", 1), ("evals", "concepts")):
        status, out, err = run(*command)
        assert (status, out, err.count("\n")) == (2, [], 1), err


def test_slugs_are_names_of_files() -> None:
    assert slug("A red apple, glossy 3D") == "a-red-apple-glossy-3d"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("🍏") == "picture"
    for text in ("word " * 100, "w" * 300, "ü" * 300, "語" * 300):
        assert 0 < len(slug(text).encode()) <= 60


def test_a_file_of_another_hand_stays(run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a-pear-0.png").write_text("not even a picture")
    status, out, _ = run(*sample(tiny_model, "a pear", "--size", 16))
    assert status == 0
    assert (tmp_path / "pictures" / "a-pear-0.png").read_text() == "not even a picture"
    assert Path(out[-1]).is_file()


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    write_png(Image.new("RGB", (4, 4), "red"), path, {"prompt": "grün 语"})
    before = path.read_bytes()
    assert read_chunks(path) == {"prompt": "grün 语"}
    with pytest.raises(AttributeError):
        write_png(None, path, {})  # pyright: ignore[reportArgumentType]
    assert files(tmp_path) == {"x.png": before}


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 3), (7, 4), (8, 4), (9, 3), (12, 4), (48, 8)]
)
def test_a_sheet_has_rows_as_full_as_may_be(count: int, columns: int) -> None:
    assert columns_of(count) == columns


def test_a_grid_may_end_with_a_part_of_a_row() -> None:
    sheet = grid([Image.new("RGB", (4, 4), "red")] * 3, columns=2, gap=2)
    assert sheet.size == (10, 10)
    assert sheet.getpixel((8, 8)) == (255, 255, 255)
