"""Options that commands share."""

from pathlib import Path

import pytest

from unclip.cli import main
from unclip.options import Common
from unclip.pictures import read_chunks


@pytest.mark.parametrize("command", ["vary", "edit", "inpaint", "interpolate", "img2img", "reconstruct", "study"])
def test_every_command_on_latents_has_tiles(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "--tile" in capsys.readouterr().out


def test_tiles_are_used_from_loading_on(tiny_model: Path, tmp_path: Path) -> None:
    common = Common(out=tmp_path / "pictures", model=str(tiny_model), tile=64)
    assert common.load().tile == 64
    assert common.named()["tile"] == 64
    assert "tile" not in Common().named()


def test_a_tiled_picture_is_another_and_says_so(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["study", "a red apple", "--num-images", "1", "--device", "cpu", "--model", str(tiny_model)]
    made = []
    for more in ([], ["--tile", "64"]):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, *more])
        out, err = capsys.readouterr()
        assert not caught.value.code, err
        made.append([Path(line) for line in out.splitlines()])
    whole, tiled = made
    assert len({*whole, *tiled}) == 6  # nothing is overwritten
    assert whole[0].read_bytes() != tiled[0].read_bytes()
    chunks = read_chunks(tiled[0]) or {}
    assert '"tile": 64' in chunks["settings"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--tile", "60"])
    assert caught.value.code == 2
    assert "a tile of 60 pixels does not fit" in capsys.readouterr().err
