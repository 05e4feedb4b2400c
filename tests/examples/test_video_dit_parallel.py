"""The video DiT on several processes: the torchrun example, and the splitting of the model's tokens in it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from support.ranks import mesh_of, run_on_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "video_dit"
sys.path.insert(0, str(EXAMPLE))

import parallel  # noqa: E402
from lite_attention import LiteAttention  # noqa: E402
from lite_attention.parallel.distributed import DistributedLiteAttention  # noqa: E402
from lite_attention.parallel.mesh import sequence_mesh  # noqa: E402
from model import VideoDiT, VideoDiTConfig  # noqa: E402
from records import psnr  # noqa: E402

SCRIPT = EXAMPLE / "parallel.py"
# 512 tokens in 8 x 4 tiles, of which a high threshold drops some
TINY = VideoDiTConfig(frames=8, height=32, width=32, dim=128, depth=2, heads=2, qk_gain=1.0, qk_bias=2.5)
THRESHOLD = -1.0


def tiny_model() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(TINY).eval().requires_grad_(False)
    for parameter in model.parameters():  # adaLN-zero starts as the zero function: nothing to see
        parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def passes(model: VideoDiT, layers: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    """Three passes over the same clip: the first drops nothing yet."""
    model.use_attention(layers)
    video = torch.randn(1, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))
    return [model(video, torch.tensor([0.5]), torch.tensor([3])) for _ in range(3)]


def split_and_whole(ring: int, ulysses: int) -> dict[str, Any]:
    """A task of every rank: the model with its tokens split, and the same without."""
    mesh = mesh_of("cpu", ring, ulysses)
    place = sequence_mesh(mesh, "test")
    model = tiny_model()
    alone = [LiteAttention(threshold=THRESHOLD) for _ in model.blocks]
    expected = passes(model, alone)
    layers = [DistributedLiteAttention(mesh, threshold=THRESHOLD) for _ in model.blocks]
    lengths: list[int] = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with parallel.SplitTokens(model, place):
        outs = passes(model, layers)
    hooks_left = len(model.patch_out._forward_hooks) + len(model.blocks[0]._forward_pre_hooks)
    maps_equal = ulysses > 1 and all(
        torch.equal(layer.keep_map(), one.keep_map()[:, layer.local_heads(TINY.heads)])
        for layer, one in zip(layers, alone, strict=True)
    )
    return {
        "lengths": lengths,
        "errors": [float((out - other).norm() / other.norm()) for out, other in zip(outs, expected, strict=True)],
        "skipped": float(alone[0].skip_fraction()),
        "maps_equal": maps_equal,
        "hooks_left": hooks_left,
    }


@pytest.mark.slow
def test_by_ulysses_a_model_of_split_tokens_computes_and_skips_as_a_whole_one() -> None:
    for found in run_on_ranks(2, "cpu", split_and_whole, 1, 2):
        assert found["lengths"] == [256] * 3
        assert max(found["errors"]) < 1e-5
        assert found["maps_equal"]
        assert 0.05 < found["skipped"] < 0.9
        assert found["hooks_left"] == 0


@pytest.mark.slow
def test_in_a_ring_a_model_of_split_tokens_computes_as_a_whole_one_until_it_skips() -> None:
    for found in run_on_ranks(2, "cpu", split_and_whole, 2, 1):
        assert found["lengths"] == [256] * 3
        assert found["errors"][0] < 1e-5
        assert 1e-5 < found["errors"][2] < 0.05  # other tiles are skipped, and few that matter


@pytest.mark.slow
def test_torchrun_denoises_the_demos_video(tmp_path: Path) -> None:
    picture = tmp_path / "frames.png"
    options = f"--steps 2 --dense-first 0 --frames 4 --guidance 1 --threshold -4 --picture {picture}".split()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(SCRIPT), *options], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu, 1 in the ring times 2 by Ulysses" in done.stdout
    shares = re.search(r"by rank: ([\d.]+)%, ([\d.]+)%", done.stdout)
    assert shares is not None
    assert all(5 < float(share) < 95 for share in shares.groups())
    difference = re.search(r"largest difference (\S+) of 1", done.stdout)
    assert difference is not None
    assert float(difference[1]) < 1e-5
    assert "skip states: 0 of 4096 tiles differ" in done.stdout
    assert picture.stat().st_size > 10_000


def test_a_comparison_tells_what_differs() -> None:
    video, keep = torch.rand(1, 3, 4, 8, 8), torch.ones(1, 2, 4, 3, dtype=torch.bool)
    single = parallel.Result(video, [keep], torch.tensor(0.25), 2.0)
    other_map, other_video = keep.clone(), video.clone()
    other_map[0, 1, 2] = False
    other_video[0, 0, 0, 0, 0] += 0.5
    lines = parallel.compare(parallel.Result(other_video, [], torch.tensor(0.5), 1.0), single, [other_map])
    assert lines[0] == "one process: 2.0 s, one more step would skip 25.0% of the tiles"
    quality = float(psnr(other_video, video))
    assert lines[1] == f"videos: largest difference 5.00e-01 of 1, PSNR {quality:.1f} dB (99 stands for equal)"
    assert lines[2] == "skip states: 3 of 24 tiles differ"
    equal = parallel.compare(single, single, None)
    assert "largest difference 0.00e+00 of 1 (equal bits), PSNR 99.0 dB" in equal[1]
    assert len(equal) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ring 3", "--ring is 3, expected a divisor of the 4 processes"),
        ("--ring 2 --ulysses 4", "--ring 2 times --ulysses 4 is not 4, the number of processes"),
        ("--steps 2 --dense-first 2", "--dense-first at least 0 and less"),
        ("--threshold 1", "--threshold: powers of two, at most 0"),
        ("--weights nowhere", "nowhere does not exist"),
        ("--device cuda", "GPUs for 4 processes of this machine"),
    ],
)
def test_arguments_are_checked(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parallel.parse_args(["--ring", "2"]).ulysses == 2
    with pytest.raises(SystemExit):
        parallel.parse_args(options.split())
    assert message in capsys.readouterr().err


def test_without_torchrun_the_example_says_how_to_start_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        parallel.parse_args([])
    assert "torchrun --nproc-per-node 2 examples/video_dit/parallel.py" in capsys.readouterr().err
