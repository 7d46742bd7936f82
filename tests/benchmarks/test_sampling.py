"""The benchmark runs, its file holds what it prints, and in fp32 both sides draw the same."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import machine, sampling

SMALL = ["--size", "tiny", "--steps", "3", "3", "3", "--rounds", "2", "--peak-side", "256"]


def test_a_tiny_stack_against_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "new" / "sampling.json"
    sampling.main([*SMALL, "--json", str(path)])
    data = json.loads(path.read_text())
    rows = {(row["stage"], row["dtype"]): row for row in data["rows"]}
    assert list(rows) == [(stage, dtype) for stage in sampling.STAGES for dtype in ("fp32", "bf16")]
    for (_, dtype), row in rows.items():
        assert row["seconds"] > 0 and row["peer_seconds"] > 0 and row["gflop"] > 0
        assert (row["difference"] is None) == (dtype == "bf16") and (row["psnr"] is None) == (dtype == "fp32")
        assert (
            row["difference"] is None or row["difference"] < 2e-3
        )  # of three steps, the first of which divides by 5e-5
    assert rows["prior", "fp32"]["gflop"] < rows["prior", "fp32"]["peer_gflop"] / 5
    up = rows["super_resolution", "fp32"]
    assert up["gflop"] == pytest.approx(up["peer_gflop"], rel=1e-3)
    assert set(data["peak_gflops"]) == {"fp32", "bf16"} and data["options"]["size"] == "tiny"
    assert capsys.readouterr().out.count("\n| ") + 1 == 1 + len(rows)


def test_without_its_package_the_other_peer_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dalle2_pytorch", None)
    with pytest.raises(SystemExit, match=r"needs the package dalle2-pytorch \(.*\); run: pip install dalle2-pytorch"):
        sampling.main(["--peer", "dalle2", "--peak-side", "256"])


@torch.no_grad()
def test_arithmetic_is_counted_by_either_library():
    from unclip.core.products import linear

    x, weight = torch.randn(1024, 512), torch.randn(256, 512)
    assert machine.gflop(lambda: linear(x, weight)) == pytest.approx(2 * 1024 * 512 * 256 / 1e9)
    assert machine.gflop(lambda: torch.nn.functional.linear(x, weight)) == pytest.approx(2 * 1024 * 512 * 256 / 1e9)


def test_memory_of_a_run_is_what_it_takes_beyond_what_was_there():
    freed = torch.ones(10 * 2**20)
    del freed
    taken = machine.memory_mb(lambda: torch.ones(50 * 2**20 // 4), torch.device("cpu"))
    assert taken is None or 45 < taken < 60
