import json
from dataclasses import replace

import pytest

from unclip.presets import DEFAULTS, read_presets, write_presets


def test_presets_round_trip_and_refuse_what_they_do_not_know() -> None:
    presets = read_presets({"mine": {"decoder": {"steps": [900, 500, 0]}}})
    assert presets["mine"]["decoder"].steps == (900, 500, 0)
    assert presets["mine"]["prior"] == presets["default"]["prior"]
    assert read_presets(json.loads(json.dumps(write_presets(presets)))) == presets
    assert {k: v for k, v in presets.items() if k != "mine"} == read_presets(DEFAULTS)
    with pytest.raises(ValueError, match="the stage 'vae'"):
        read_presets({"fast": {"vae": {}}})
    with pytest.raises(ValueError, match="the setting 'speed'"):
        read_presets({"fast": {"decoder": {"speed": 1}}})


@pytest.mark.parametrize(
    ("stage", "values", "says"),
    [
        ("decoder", {"draws": 4}, "gives decoder the setting 'draws', which has no effect"),
        ("upsampler_256", {"guidance_scale": 3.0}, "gives upsampler_256 the setting 'guidance_scale'"),
        ("upsampler_1024", {"guidance_interval": [100, 900]}, "gives upsampler_1024 the setting 'guidance_interval'"),
        ("decoder", {"eta": 1.0}, r"gives decoder eta 1.0 and the solver 'dpm\+\+'; eta is ddim's"),
    ],
)
def test_what_a_stage_has_no_use_for_is_refused(stage: str, values: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_presets({"mine": {stage: values}})


def test_a_default_may_be_none_of_a_model_s() -> None:
    presets = read_presets({"paper": None, "mine": {}})
    assert set(presets) == {"fast", "default", "mine"}
    assert read_presets(json.loads(json.dumps(write_presets(presets)))) == presets
    with pytest.raises(ValueError, match="preset 'default' is None"):
        read_presets({"default": None})


def test_the_paper_preset_is_table_3() -> None:
    paper = read_presets(None)["paper"]
    assert [stage.steps for stage in paper.values()] == [64, 250, 27, 15]
    assert paper["prior"].draws == 2
    assert paper["prior"].solver == "ddpm"
    analytic = read_presets(None, analytic=True)
    assert analytic["paper"]["prior"] == replace(paper["prior"], solver="analytic")
    assert {**analytic, "paper": paper} == read_presets(None)
