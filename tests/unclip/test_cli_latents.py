"""The commands on latents: what they print and write, and that bad input costs one sentence and no file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from unclip.cli import main
from unclip.pictures import read_chunks

FEW = ("--device", "cpu", "--dtype", "fp32", "--size", 16)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path):
    """Runs a command line on the tiny model in a folder with a picture: (exit status, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((8, 4, 30, 26), fill="red")
    image.save("photo.png")
    Image.linear_gradient("L").resize(image.size).save("mask.png")
    Image.new("L", image.size).save("black.png")

    def call(command: str, *arguments: object, model: Path = tiny_model) -> tuple[int, list[str], str]:
        with pytest.raises(SystemExit) as caught:
            main([command, *(str(a) for a in arguments), "--model", str(model), *(str(a) for a in FEW)])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out.splitlines(), err

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("command", "arguments", "name", "count"),
    [
        ("vary", ["photo.png", "--num-images", 3, "--eta", 0.5, "--steps", 2], "photo-varied", 3),
        ("vary", ["a red apple", "--num-images", 2, "--steps", 2], "a-red-apple-varied", 2),
        ("interpolate", ["photo.png", "a red apple", "--frames", 3, "--steps", 2], "photo-to-a-red-apple", 3),
        ("interpolate", ["photo.png", "photo.png", "--x-t", "fixed", "--steps", 2], "photo-to-photo", 8),
        ("edit", ["photo.png", "a red apple", "--strengths", "0,0.5", "--steps", 2], "photo-to-a-red-apple", 2),
        ("img2img", ["photo.png", "a red apple", "--strength", 0.7], "photo-as-a-red-apple", 1),
        ("inpaint", ["photo.png", "a red apple", "--mask", "mask.png"], "photo-with-a-red-apple", 1),
        ("inpaint", ["photo.png", "a red apple", "--margin", 0.5, "--resamples", 1], "photo-with-a-red-apple", 1),
        ("inpaint", ["photo.png", "a red apple", "--margin", 0.5, "--method", "replace"], "photo-with-a-red-apple", 1),
        ("study", ["a red apple", "--num-images", 2], "a-red-apple-study", 6),
    ],
)
def test_each_command_writes_pictures_and_a_sheet(run, tmp_path: Path, command, arguments, name, count) -> None:
    status, out, err = run(command, *arguments, "--seed", 3, "--out", "made", "--sheet")
    assert status == 0, err
    assert out == [*(f"made/{name}-{i:02d}-3.png" for i in range(count)), f"made/{name}-sheet-3.png"]
    for path in out[:-1]:
        with Image.open(path) as image:
            assert image.size == (16, 16)
        chunks = read_chunks(Path(path)) or {}
        assert chunks["model"] == "tiny"
        assert json.loads(chunks["settings"])["seed"] == 3
        assert json.loads(chunks["operation"])
    first = files(tmp_path)
    assert run(command, *arguments, "--seed", 3, "--out", "made", "--sheet")[0] == 0
    assert files(tmp_path) == first


def test_other_settings_overwrite_nothing(run, tmp_path: Path) -> None:
    arguments = ("photo.png", "a red apple", "--strengths", "0.2,0.4", "--sheet", "--gif")
    assert run("edit", *arguments, "--steps", 2)[0] == 0
    before = files(tmp_path)
    status, out, err = run("edit", *arguments, "--steps", 3)
    assert status == 0, err
    assert len(out) == 4
    assert before.items() < files(tmp_path).items()
    assert len(files(tmp_path)) == len(before) + 4


def test_what_no_setting_says_overwrites_nothing_either(run, tmp_path: Path) -> None:
    """Transparency kept or not, another picture or mask of the same name, another choice of pictures on a sheet."""
    mask, few = tmp_path / "mask.png", ("--steps", 1, "--sheet", "--out", "made")
    Image.new("L", Image.open(tmp_path / "photo.png").size, 255).save(mask)
    commands: list[tuple[str | int, ...]] = [
        ("vary", "photo.png", "--num-images", 1, *few),
        ("vary", "photo.png", "--num-images", 1, "--keep-alpha", *few),
        ("vary", "photo.png", "--num-images", 2, *few),
        ("vary", "photo.png", "--num-images", 1, "--labels", "a fox,an owl", *few),
        ("inpaint", "photo.png", "a red apple", "--mask", "mask.png", "--resamples", 1, *few),
    ]
    sheets: set[str] = set()
    before: dict[Path, bytes] = {}
    for command in [*commands, commands[-1]]:
        status, out, err = run(*command)
        assert status == 0, err
        after = files(tmp_path / "made")
        assert before.items() < after.items()
        assert out[-1] not in sheets
        sheets, before = sheets | {out[-1]}, after
        painted = Image.open(mask).convert("L")
        painted.paste(0, (0, 0, 4, 4 * len(sheets)))
        painted.save(mask)


def test_models_of_one_name_overwrite_nothing(run, copy_model: Callable[[], Path], tiny_model: Path, tmp_path: Path):
    other = copy_model().rename(tmp_path / tiny_model.name)
    index = json.loads((other / "model_index.json").read_text())
    index["presets"]["default"]["decoder"]["steps"] = 3
    arguments = ("study", "a red apple", "--num-images", 1, "--sheet")
    assert run(*arguments, "--out", "made")[0] == 0
    first = files(tmp_path / "made")
    for count in (4, 8):  # the copy as it is, and with another preset
        assert run(*arguments, "--out", "made", model=other)[0] == 0
        assert first.items() <= files(tmp_path / "made").items()
        assert len(files(tmp_path / "made")) == count
        (other / "model_index.json").write_text(json.dumps(index))


def test_an_animation_goes_there_and_back(run) -> None:
    status, out, err = run("interpolate", "a red apple", "two stars", "--frames", 4, "--steps", 2, "--gif")
    assert status == 0, err
    assert [Path(path).suffix for path in out] == [".png"] * 4 + [".gif"]
    with Image.open(out[-1]) as animation:
        assert animation.size == (16, 16)
        assert getattr(animation, "n_frames") == 6  # noqa: B009
        assert animation.info["loop"] == 0


def test_a_picture_stands_at_its_own_end_of_a_sheet(run) -> None:
    for ends, cells in (
        (("photo.png", "two stars"), ["photo", "0.00", "1.00"]),
        (("two stars", "photo.png"), ["0.00", "1.00", "photo"]),
    ):
        status, out, err = run("interpolate", *ends, "--frames", 2, "--steps", 2, "--sheet")
        assert status == 0, err
        assert json.loads((read_chunks(Path(out[-1])) or {})["cells"]) == cells


def test_settings_name_what_was_really_computed_with(run) -> None:
    status, out, err = run("vary", "photo.png", "--num-images", 1, "--steps", 1)
    assert status == 0, err
    settings = json.loads((read_chunks(Path(out[0])) or {})["settings"])
    assert (settings["dtype"], settings["device"]) == ("float32", "cpu")


def test_labels_are_printed_with_their_probabilities(run) -> None:
    status, out, err = run("vary", "photo.png", "--labels", "apple, fish", "--num-images", 2, "--steps", 2, "--sheet")
    assert status == 0, err
    assert len(out) == 3
    rows = [line for line in err.splitlines() if "apple" in line and "fish" in line]
    assert [row.partition(":")[0] for row in rows] == ["photo", "seed 0", "seed 1"]
    assert all("%" in row for row in rows)


def test_alpha_is_kept_where_asked(run) -> None:
    status, out, err = run("img2img", "photo.png", "a red apple", "--keep-alpha")
    assert status == 0, err
    with Image.open(out[0]) as image:
        assert image.mode == "RGBA"
        assert image.getpixel((0, 0))[3] == 0
        assert image.getpixel((8, 8))[3] == 255


def test_a_basis_is_fitted_and_pictures_are_made_of_its_first_components(
    run, copy_model: Callable[[], Path], tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_model()
    with pytest.raises(SystemExit) as caught:
        main(["pca", "fit", "--model", str(model), "--corpus", str(tiny_corpus), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert not caught.value.code, err
    assert out.splitlines() == [str(model / "pca")]
    few = ("--components", "1,4,16", "--steps", 2, "--sheet", "--size", 16, "--device", "cpu", "--model", model)
    with pytest.raises(SystemExit) as caught:
        main(["reconstruct", "photo.png", *(str(word) for word in few)])
    out, err = capsys.readouterr()
    assert not caught.value.code, err
    assert [Path(path).name for path in out.splitlines()] == [
        *(f"photo-components-{i:02d}-0.png" for i in range(3)),
        "photo-components-sheet-0.png",
    ]
    labels = [(read_chunks(Path(path)) or {})["label"] for path in out.splitlines()[:3]]
    assert labels == ["1 component", "4 components", "16 components"]
    with pytest.raises(SystemExit) as caught:  # the name of no file is no caption
        main(["reconstruct", "photo", *(str(word) for word in few)])
    assert caught.value.code == 2
    assert "photo" in capsys.readouterr().err
    status, _, err = run("reconstruct", "photo.png")
    assert status == 2
    assert "unclip pca fit" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["vary", "nowhere.png"], "nowhere.png"),
        (["vary", "letter.png"], "not a readable picture"),
        (["vary", ""], "prompt is empty"),
        (["vary", "photo.png", "--eta", 2], "eta is 2"),
        (["vary", "photo.png", "--steps", 0], "steps are 0"),
        (["vary", "photo.png", "--frame", "stretch"], "stretch"),
        (["vary", "photo.png", "--num-images", 0], "num_images is 0"),
        (["vary", "photo.png", "--out", "letter.png"], "is a file"),
        (["vary", "a red apple", "--labels", "a,b"], "a red apple"),
        (["interpolate", "photo.png", "two stars", "--frames", 1], "n is 1"),
        (["edit", "photo.png", "two stars", "--strengths", "0,much"], "--strengths is '0,much'"),
        (["edit", "photo.png", "two stars", "--strengths", "0,inf"], "--strengths"),
        (["edit", "photo.png", "two stars", "--from", "two stars"], "the same embedding"),
        (["img2img", "two stars", "photo.png"], "two stars"),
        (["inpaint", "photo.png", "two stars", "--mask", "black.png"], "nothing is to be drawn"),
        (["inpaint", "photo.png", "two stars", "--mask", "letter.png"], "not a readable picture"),
        (["inpaint", "photo.png", "two stars", "--margin", "0.5", "--method", "tuned"], "was not tuned to inpaint"),
        (["study", "two stars", "--preset", "best"], "preset 'best' is unknown"),
    ],
)
def test_bad_input_is_one_sentence_and_no_file(run, tmp_path: Path, arguments, says: str) -> None:
    (tmp_path / "letter.png").write_text("dear")
    before = files(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (2, [])
    assert says in err
    assert "Traceback" not in err
    assert files(tmp_path) == before
