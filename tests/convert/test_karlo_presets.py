"""How a Karlo folder samples under each of its presets."""

from pathlib import Path

import pytest

from unclip.convert.karlo import write_diffusers
from unclip.pipeline import UnCLIP

PRESETS = ["fast", "default", "karlo"]


@pytest.fixture(scope="module")
def pipe(text2img: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(text2img)


def test_its_presets_are_karlos_own(pipe: UnCLIP, tmp_path: Path) -> None:
    converted = UnCLIP.from_pretrained(pipe.save_pretrained(tmp_path / "ours"))
    back = UnCLIP.from_pretrained(write_diffusers(converted, tmp_path / "theirs"))
    for one in (pipe, converted, back):
        assert list(one.presets) == PRESETS
        for preset in PRESETS:
            settings = one.settings(preset)
            assert (settings["prior"].guidance_scale, settings["decoder"].guidance_scale) == (4.0, 8.0)
            assert settings["prior"].draws == 1
            assert settings["upsampler_256"] == one.settings("karlo")["upsampler_256"]
        assert one.settings("default") == one.settings("karlo")
        with pytest.raises(ValueError, match="preset 'paper' is unknown; this model has fast, default, karlo"):
            one("a pear", preset="paper")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_last_network_runs_at_the_last_step_alone(pipe: UnCLIP, preset: str) -> None:
    called: list[tuple[str, int]] = []
    handles = [
        getattr(pipe, name).register_forward_pre_hook(lambda _, a, name=name: called.append((name, int(a[1][0]))))
        for name in ("upsampler_256", "upsampler_256_last")
    ]
    pipe("a pear", preset=preset, steps=(1, 1))
    for handle in handles:
        handle.remove()
    assert [t for name, t in called if name == "upsampler_256_last"] == [0]
    assert [t for name, t in called if name == "upsampler_256"] == [999, 832, 666, 500, 333, 166]


def test_the_fast_preset_is_guided_between_the_ends_and_takes_less(pipe: UnCLIP) -> None:
    rows: dict[str, list[tuple[int, int]]] = {"prior": [], "decoder": []}
    handles = [
        getattr(pipe, name).register_forward_pre_hook(lambda _, a, of=of: of.append((int(a[1][0]), len(a[0]))))
        for name, of in rows.items()
    ]
    drawn = [pipe("a pear", preset=preset, output_type="pt") for preset in ("fast", "karlo")]
    for handle in handles:
        handle.remove()
    assert all(output.images.isfinite().all() for output in drawn)
    fast, karlo = rows["decoder"][:12], rows["decoder"][12:]
    assert [n for _, n in karlo] == [2] * 25
    assert [n for _, n in fast] == [1, 1, *[2] * 9, 1]
    assert all(150 <= t <= 900 for t, n in fast if n == 2)
    assert len(rows["prior"]) == 12 + 25
