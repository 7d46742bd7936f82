from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from unclip.evals.sheets import contact_sheet, nearest, save_sheet, to_images, wrap
from unclip.pictures import write_gif


def test_every_picture_is_on_the_sheet_unchanged():
    pictures = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = to_images(pictures)
    sheet = np.array(contact_sheet([[image] for image in images], ["a label"] * 5, columns=2, side=16))
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (16, 16, 3))[:, :, 0]
    for image in images:
        assert (windows == np.array(image)).all(axis=(2, 3, 4)).sum() == 1


def test_whole_enlargement_repeats_pixels():
    image = Image.effect_noise((8, 8), 80).convert("RGB")
    sheet = np.array(contact_sheet([[image]], [""], side=32))
    large = np.array(image).repeat(4, 0).repeat(4, 1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (32, 32, 3))[:, :, 0]
    assert (windows == large).all(axis=(2, 3, 4)).any()


def test_labels_stay_within_their_cells():
    font = ImageFont.load_default(size=12)
    for text in ("short", "a very long caption that will not fit in so few lines at this width at all", "W" * 80, ""):
        lines = wrap(text, font, 100)
        assert 1 <= len(lines) <= 3
        assert all(font.getlength(line) <= 100 for line in lines)


def test_nearest_finds_itself():
    gallery = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([3, 17, 29])
    assert torch.equal(nearest(gallery[index], gallery), index)


def test_the_saved_sheet_is_whole_and_alone(tmp_path):
    sheet = contact_sheet([[Image.new("RGB", (8, 8))]], ["x"], title="a title")
    path = save_sheet(sheet, tmp_path / "new" / "sheet.png")
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]
    assert Image.open(path).size == sheet.size


def test_a_long_title_takes_lines_and_no_width():
    cells, titles = [[Image.new("RGB", (8, 8))]], ("", "short", "so long that one line of one cell cannot hold it")
    none, short, long = (contact_sheet(cells, ["x"], title=title).size for title in titles)
    assert none[0] == short[0] == long[0] and none[1] < short[1] < long[1]


def test_bad_input_is_named():
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="1 cells came with 2 labels"):
        contact_sheet([[image]], ["a", "b"])
    with pytest.raises(ValueError, match="without pictures"):
        contact_sheet([[]], ["a"])
    with pytest.raises(ValueError, match="gallery came empty"):
        nearest(torch.eye(2), torch.empty(0, 2))


def test_what_is_transparent_is_white_on_sheets_and_in_animations(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    page = np.array(contact_sheet([[clear]], [""], side=16))
    assert (page == page[0, 0]).all() and page.max() == page.min() == 255
    write_gif([clear, clear], tmp_path / "clear.gif", 20)
    with Image.open(tmp_path / "clear.gif") as animation:
        assert (np.array(animation.convert("RGB")) == 255).all()
