import pytest
import torch

from unclip.arguments import check_fit, choose_device, choose_dtype, finite
from unclip.pipeline import UnCLIP


def test_stages_that_do_not_fit_are_named_with_both_numbers(pipe: UnCLIP) -> None:
    class Other:
        config = {**pipe.decoder.config, "z_i_width": 99}  # noqa: RUF012

    with pytest.raises(ValueError, match="99 but CLIP's is 16"):
        check_fit(pipe.clip, pipe.prior, Other, None, None)
    with pytest.raises(ValueError, match="256 but what the stages before give 64"):
        check_fit(pipe.clip, pipe.prior, pipe.decoder, pipe.upsampler_1024, None)
    with pytest.raises(ValueError, match="without the first"):
        check_fit(pipe.clip, pipe.prior, pipe.decoder, None, pipe.upsampler_1024)


def test_dtypes_and_devices_by_name() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype(None, cpu) == choose_dtype("fp32", cpu) == torch.float32
    assert choose_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="dtype 'int8'"):
        choose_dtype("int8", cpu)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="device 'abacus'"):
        choose_device("abacus")


def test_what_is_not_finite_is_named_as_options_name_it() -> None:
    x = torch.tensor([0.0, float("nan")])
    with pytest.raises(ValueError, match=r"^decoder gave NaN or infinity in bf16; .*fp32.*--dtype fp32") as caught:
        finite(x, "decoder", torch.bfloat16)
    assert "torch" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^decoder gave NaN or infinity in fp32; check its weights\.$"):
        finite(x, "decoder", torch.float32)
    assert finite(x[:1], "decoder", torch.float32).tolist() == [0.0]
