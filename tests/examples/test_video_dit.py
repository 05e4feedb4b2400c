"""The video DiT example: model, data, sampler, drop-rule study and the demo with its report."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lite_attention import LiteAttention, video_sparse_attn
from lite_attention.maps.video_tiles import VideoTiles

EXAMPLE = Path(__file__).parents[2] / "examples" / "video_dit"
sys.path.insert(0, str(EXAMPLE))

import demo  # noqa: E402
import report  # noqa: E402
from data import MovingDigits, load_photos  # noqa: E402
from emulated import EmulatedLiteAttention, tile_margins, visiting_order  # noqa: E402
from evaluate import skipped_at  # noqa: E402
from families import CUBE, RememberedTiles, SlidingTiles, TileChoice, TopBlocks, cubes_seen, make_windows  # noqa: E402
from model import (  # noqa: E402
    SdpaAttention,
    VideoDiT,
    VideoDiTConfig,
    apply_rope,
    block_order,
    load_weights,
    patchify,
    rope_tables,
    save_weights,
    unpatchify,
)
from records import psnr, relative_l2  # noqa: E402
from sampling import denoise, initial_noise, sample, timesteps  # noqa: E402
from sparsity import soft_density  # noqa: E402

# 512 tokens, so 8 x 4 tiles, and attention local enough to drop some of them
TINY = VideoDiTConfig(frames=8, height=32, width=32, dim=128, depth=2, heads=2, qk_gain=1.0, qk_bias=2.5)


@pytest.fixture
def tiny() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(TINY).eval().requires_grad_(False)
    for parameter in model.parameters():  # adaLN-zero starts as the zero function: nothing to see
        parameter.add_(0.03 * torch.randn_like(parameter))
    return model


# --- model ---


def test_velocity_has_the_shape_of_the_video(tiny: VideoDiT) -> None:
    for frames in (4, 8):
        out = tiny(torch.randn(2, 3, frames, 32, 32), torch.tensor([0.1, 0.9]), torch.tensor([3, 10]))
        assert out.shape == (2, 3, frames, 32, 32)
        assert out.std() > 1e-3


def test_patches_come_back_where_they_were() -> None:
    video = torch.randn(2, 3, 8, 16, 32)
    tokens = patchify(video, 4)
    assert tokens.shape == (2, 8 * 4 * 8, 48)
    assert torch.equal(unpatchify(tokens, (8, 4, 8), 4), video)


def test_64_consecutive_tokens_are_a_cube() -> None:
    t, y, x = torch.unravel_index(block_order((8, 8, 16)), (8, 8, 16))
    for axis in (t, y, x):
        span = axis.view(-1, 64)
        assert torch.equal(span.amax(1) - span.amin(1), torch.full((16,), 3))
    assert x[64] == 4  # the neighbour to the right completes a KV tile


def test_block_order_refuses_a_ragged_grid() -> None:
    with pytest.raises(ValueError, match="no multiple of 4"):
        block_order((8, 6, 8))


def test_rope_scores_depend_on_the_offset_alone() -> None:
    grid = (8, 8, 8)
    cos, sin = rope_tables(grid, 64, 32.0, torch.device("cpu"))
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    position = {
        tuple(p): i for i, p in enumerate(torch.stack(torch.unravel_index(block_order(grid), grid), 1).tolist())
    }

    def score(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
        i, j = position[a], position[b]
        return float((apply_rope(q, cos[i], sin[i]) * apply_rope(k, cos[j], sin[j])).sum())

    assert score((0, 1, 2), (3, 3, 3)) == pytest.approx(score((4, 5, 6), (7, 7, 7)), abs=1e-4)
    assert abs(score((0, 1, 2), (3, 3, 3)) - score((0, 1, 2), (3, 3, 4))) > 1e-3


def test_state_dict_does_not_depend_on_the_attention() -> None:
    dense, lite = VideoDiT(TINY, SdpaAttention), VideoDiT(TINY, LiteAttention)
    assert list(dense.state_dict()) == list(lite.state_dict())
    lite.load_state_dict(dense.state_dict())


def test_lite_attention_without_skipping_equals_sdpa(tiny: VideoDiT) -> None:
    arguments = (torch.randn(1, 3, 8, 32, 32), torch.tensor([0.7]), torch.tensor([1]))
    expected = tiny(*arguments)
    tiny.use_attention([LiteAttention(enable_skipping=False) for _ in tiny.blocks])
    torch.testing.assert_close(tiny(*arguments), expected, atol=2e-5, rtol=1e-4)


def test_class_and_null_class_change_the_velocity(tiny: VideoDiT) -> None:
    video, time = torch.randn(1, 3, 4, 32, 32), torch.tensor([0.5])
    outs = [tiny(video, time, torch.tensor([label])) for label in (0, 1, TINY.null_class)]
    assert TINY.null_class == 10
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (outs[a] - outs[b]).abs().max() > 1e-4


def test_weights_survive_a_round_trip(tiny: VideoDiT, tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", tiny.state_dict(), TINY)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.config == TINY
    for name, value in tiny.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=1e-3, rtol=1e-3)


def test_committed_weights_load_and_denoise() -> None:
    path = EXAMPLE / "video_dit.safetensors"
    assert path.stat().st_size <= 15_000_000
    model = load_weights(path)
    config = model.config
    assert config.grid()[0] * config.grid()[1] * config.grid()[2] >= 4096
    assert config.depth >= 4
    assert config.head_dim in (64, 128)
    # at little noise the velocity must point from a clean clip to the noise: far better than predicting 0
    clean, label = MovingDigits(seed=11).batch(1, 4)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.4])
    velocity = model(torch.lerp(clean, noise, 0.4), time, label)
    target = noise - clean
    assert (velocity - target).square().mean() < 0.15 * target.square().mean()


# --- data ---


def test_same_seed_same_clips() -> None:
    first, second, other = (MovingDigits(seed=seed) for seed in (5, 5, 6))
    (video, label), (again, label_again), (different, _) = (d.batch(3, 4) for d in (first, second, other))
    assert torch.equal(video, again)
    assert torch.equal(label, label_again)
    assert not torch.equal(video, different)
    assert not torch.equal(video, first.batch(3, 4)[0])


def test_clips_are_coloured_textured_and_moving() -> None:
    video, label = MovingDigits(seed=1).batch(16, 8)
    assert video.shape == (16, 3, 8, 64, 64)
    assert video.abs().max() <= 1
    assert label.min() >= 0
    assert label.max() <= 9
    assert (video[:, :, 0] - video[:, :, -1]).abs().mean(dim=(1, 2, 3)).min() > 0.005
    assert (video[:, 0] - video[:, 2]).abs().mean() > 0.05
    # consecutive frames are alike: the motion is smooth
    steps = (video[:, :, 1:] - video[:, :, :-1]).square().mean()
    assert steps < 0.3 * (video[:, :, 4:] - video[:, :, :-4]).square().mean() + 0.02


def test_photos_are_squares_with_content() -> None:
    photos = load_photos()
    assert photos.shape[1:] == (3, 160, 160)
    assert len(photos) >= 15
    assert photos.flatten(1).std(dim=1).min() > 0.02


# --- sampler ---


def test_timesteps_run_from_noise_to_clip() -> None:
    levels = timesteps(10, 3.0)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()
    assert levels[5] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    with pytest.raises(ValueError, match="at least 1"):
        timesteps(0, 1.0)


def test_sampler_is_exact_on_a_straight_field() -> None:
    target = torch.full((2, 3, 4, 8, 8), 0.25)
    noise = torch.randn_like(target)

    def field(x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return noise - target  # the path from noise to target is straight, so any step count lands on it

    for steps, shift in ((1, 1.0), (7, 4.0)):
        out = sample(field, noise, torch.zeros(2).long(), null_class=10, steps=steps, guidance=1.0, shift=shift)
        torch.testing.assert_close(out, target, atol=1e-5, rtol=0)


def test_guidance_extrapolates_from_the_null_class() -> None:
    noise = torch.zeros(1, 3, 4, 8, 8)

    def field(x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        assert label.tolist() == [4, 10]
        return torch.where(label == 10, -0.1, -0.3).view(-1, 1, 1, 1, 1).expand_as(x)

    out = sample(field, noise, torch.tensor([4]), null_class=10, steps=3, guidance=2.0, shift=1.0)
    torch.testing.assert_close(out, torch.full_like(noise, 0.5))  # 0.1 + 2 * (0.3 - 0.1)


def test_a_clip_does_not_depend_on_the_others(tiny: VideoDiT) -> None:
    noise = initial_noise([1, 2], (3, 4, 32, 32))
    options = {"null_class": 10, "steps": 2, "guidance": 2.0, "shift": 2.0}
    both = sample(tiny, noise, torch.tensor([1, 2]), **options)
    alone = sample(tiny, initial_noise([2], (3, 4, 32, 32)), torch.tensor([2]), **options)
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=0)
    assert len(list(denoise(tiny, noise[:1], torch.tensor([1]), **options))) == 2


# --- the drop rule of the study ---


def test_emulated_rule_decides_as_the_package_does(tiny: VideoDiT) -> None:
    noise = initial_noise([3], (3, 8, 32, 32))
    emulated = [EmulatedLiteAttention(threshold=-1.0) for _ in tiny.blocks]
    package = [LiteAttention(threshold=-1.0) for _ in tiny.blocks]
    outs = []
    for modules in (emulated, package):
        tiny.use_attention(modules)
        outs.append(sample(tiny, noise, torch.tensor([3]), null_class=10, steps=4, guidance=2.0, shift=1.0))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-3, rtol=0)
    for ours, theirs in zip(emulated, package, strict=True):
        keep = ours.keep_map()
        assert keep is not None
        assert 0.05 < 1 - keep.float().mean() < 0.95, "the case should drop something and keep something"
        assert (keep != theirs.keep_map()).float().mean() <= 0.02  # rounding at the threshold


def test_margins_follow_the_visiting_order_and_skip_what_is_dropped() -> None:
    order = visiting_order(256, 512)
    assert order.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [3, 0, 1, 2]]
    tile_max = torch.tensor([5.0, 1.0, 9.0, 7.0]).expand(1, 1, 4, 64, 4)
    keep = torch.tensor([True, True, False, True]).expand(1, 1, 4, 4)
    margins = tile_margins(tile_max, keep, order)[0, 0]
    assert margins[0].tolist() == [float("inf"), -4.0, float("-inf"), 2.0]
    assert margins[3].tolist() == [-2.0, -6.0, float("-inf"), float("inf")]


def test_soft_density_is_the_kept_share_in_the_sharp_limit() -> None:
    q, k = 3 * torch.randn(1, 512, 2, 64), torch.randn(1, 512, 2, 64)
    emulated = EmulatedLiteAttention(threshold=-1.0)
    emulated(q, k, k)
    keep = emulated.keep_map()
    assert keep is not None
    soft = soft_density(q, k, torch.arange(8), -1.0, 1e-4)
    assert soft.item() == pytest.approx(keep.float().mean().item(), abs=0.02)
    assert soft_density(q, k, torch.arange(8), -9.0, 2.0) > soft_density(q, k, torch.arange(8), -1.0, 2.0)


def test_soft_density_has_a_gradient() -> None:
    q, k = torch.randn(1, 256, 1, 64, requires_grad=True), torch.randn(1, 256, 1, 64, requires_grad=True)
    soft_density(q, k, torch.tensor([0, 3]), -2.0, 2.0).backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert q.grad.abs().sum() > 0


# --- the families of tile choices ---

GRID = (4, 8, 16)  # 1 x 2 x 4 cubes


def windows_of(window: tuple[int, int, int], grid: tuple[int, int, int] = GRID, head_dim: int = 64) -> Any:
    return make_windows(window, grid, head_dim, torch.float32, torch.device("cpu"))


def random_qkv(batch: int = 2, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, batch, math.prod(GRID), heads, 64, generator=generator)
    return q, k, v


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("grid", [(16, 16, 16), GRID])
def test_the_model_lists_its_tokens_tile_by_tile(grid: tuple[int, int, int]) -> None:
    assert torch.equal(block_order(grid), VideoTiles(grid, CUBE).order(torch.device("cpu")))


@pytest.mark.parametrize("family", ["sliding tiles", "top-k blocks"])
@pytest.mark.parametrize("skipping", [True, False])
def test_what_sees_everything_equals_the_dense_model(tiny: VideoDiT, family: str, skipping: bool) -> None:
    arguments = (torch.randn(2, 3, 8, 32, 32), torch.tensor([0.7, 0.2]), torch.tensor([1, 10]))
    expected = tiny(*arguments)
    # switched off, even the smallest choice sees everything
    window, count = ((2, 2, 2), 8) if skipping else ((1, 1, 1), 1)
    windows = windows_of(window, TINY.grid(), TINY.head_dim)
    choices = [SlidingTiles(windows) if family == "sliding tiles" else TopBlocks(count) for _ in tiny.blocks]
    for choice in choices:
        choice.skip(skipping)
    tiny.use_attention(choices)
    torch.testing.assert_close(tiny(*arguments), expected, atol=2e-5, rtol=1e-4)
    for choice in choices:
        used = choice.take_map()
        assert used is None or bool(used.all())


def test_sliding_tiles_see_the_cubes_of_their_window() -> None:
    q, k, v = random_qkv()
    _, y, x = (axis[block_order(GRID)] // 4 for axis in torch.unravel_index(torch.arange(math.prod(GRID)), GRID))
    first = (x - 1).clamp(0, 1)[:, None]  # 3 of 4 cubes along x, moved inward at the borders; 1 of 2 along y
    mask = (y[:, None] == y) & (x >= first) & (x < first + 3)
    choice = SlidingTiles(windows_of((1, 1, 3)))
    torch.testing.assert_close(choice(q, k, v), masked_attention(q, k, v, mask), atol=1e-5, rtol=1e-4)
    used = choice.take_map()
    assert used is not None
    assert torch.equal(used[0, 0], mask[::64, ::64])


def test_top_blocks_see_the_cubes_of_best_mean() -> None:
    q, k, v = random_qkv()
    means = [x.unflatten(1, (8, 64)).mean(2) for x in (q, k)]
    best = torch.einsum("bihd,bjhd->bhij", *means).topk(3, dim=-1).indices
    blocks = torch.zeros(2, 3, 8, 8, dtype=torch.bool).scatter_(-1, best, True)
    mask = blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)
    choice = TopBlocks(3)
    out = choice(q, k, v)
    torch.testing.assert_close(out, masked_attention(q, k, v, mask), atol=1e-5, rtol=1e-4)
    used = choice.take_map()
    assert used is not None
    assert torch.equal(used, blocks)


def test_top_blocks_are_video_sparse_attention_with_a_closed_gate() -> None:
    q, k, v = random_qkv()
    sizes = torch.full((8,), 64, dtype=torch.int32)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    expected = video_sparse_attn(query, key, value, sizes, 3, compress_attn_weight=torch.zeros_like(query))
    torch.testing.assert_close(TopBlocks(3)(q, k, v), expected.transpose(1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("window", "cubes"), [((1, 1, 1), 1), ((1, 1, 3), 3), ((1, 2, 1), 2), ((3, 3, 2), 6), ((9, 9, 9), 8)]
)
def test_a_window_and_top_blocks_of_its_size_compute_equally_many_tiles(
    window: tuple[int, int, int], cubes: int
) -> None:
    windows = windows_of(window)
    assert cubes_seen(windows) == cubes
    choices: list[TileChoice] = [SlidingTiles(windows), TopBlocks(cubes_seen(windows))]
    for choice in choices:
        choice(*random_qkv())
        used = choice.take_map()
        assert used is not None
        assert used.shape[-2:] == (8, 8)
        assert (used.sum(-1) == cubes).all()


def test_lite_attention_tells_what_it_read_not_what_it_wrote() -> None:
    q, k, v = random_qkv()
    k[:, 256:] = 0  # nothing to find there
    choice = RememberedTiles(-0.1, batch=2)
    used = []
    for _ in range(3):
        choice(q, k, v)
        used.append(choice.take_map())
    assert used[0] is None
    assert used[1] is not None
    assert used[2] is not None
    assert used[1].shape == (2, 3, 8, 4)
    assert used[2].sum() <= used[1].sum() < used[1].numel()
    choice.skip(False)
    choice(q, k, v)
    assert choice.take_map() is None


# --- measures and the committed study ---


def test_psnr_and_relative_l2() -> None:
    reference = torch.full((2, 3, 4, 8, 8), 0.5)
    assert psnr(reference + 0.1, reference).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert psnr(reference, reference).tolist() == pytest.approx([99.0, 99.0])
    assert relative_l2(reference * 1.1, reference) == pytest.approx(0.1, abs=1e-4)


def test_skipped_share_at_a_quality_is_interpolated() -> None:
    points = [{"psnr_mean": 30.0, "skipped": 0.6}, {"psnr_mean": 40.0, "skipped": 0.4}]
    assert skipped_at(points, 35.0) == pytest.approx(0.5)
    assert skipped_at(points, 45.0) is None


def test_committed_study_reaches_its_aim() -> None:
    study = json.loads((EXAMPLE / "evaluation.json").read_text())
    assert study["tokens"] >= 4096
    assert len(study["seeds"]) >= 5
    best = max(curve["skipped_at_db"]["35"] or 0 for curve in study["curves"])
    assert best >= 0.4
    for curve in study["curves"]:
        shares = [point["skipped"] for point in sorted(curve["points"], key=lambda point: point["threshold"])]
        assert shares == sorted(shares)


def test_training_log_is_whole() -> None:
    lines = [json.loads(line) for line in (EXAMPLE / "train_log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "start"
    assert "H200" in lines[0]["device_name"]
    full = [line["loss"] for line in lines if line.get("stage") == "full"]
    assert full[-1] < full[0]


# --- demo and report ---


@pytest.fixture
def tiny_weights(tiny: VideoDiT, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_weights(path, tiny.state_dict(), TINY)
    return path


def made_up_result(
    grid: tuple[int, int, int] = (8, 8, 8), layers: int = 2, heads: int = 2, steps: int = 4
) -> report.Result:
    """What a run of the demo could have given, without a model."""
    generator = torch.Generator().manual_seed(0)
    tokens = math.prod(grid)
    video = torch.rand(1, 3, grid[0], grid[1] * 4, grid[2] * 4, generator=generator)
    dense = report.Run(
        video=video,
        kept=torch.ones(steps, layers, heads),
        attention_seconds=torch.full((steps, layers), 0.2),
        total_seconds=2.0,
    )
    kept = torch.ones(steps, layers, heads)
    kept[2:] = 0.5
    maps = [torch.rand(heads, tokens // 64, tokens // 128, generator=generator) < 0.5 for _ in range(layers)]
    sparse = report.Run(
        threshold=-6.0,
        video=video * 0.99,
        kept=kept,
        attention_seconds=kept.mean(dim=2) * 0.21,
        total_seconds=1.6,
        last_maps=maps,
        clip_psnr=[40.0],
        relative_l2=0.01,
    )
    options = {
        "steps": steps,
        "dense_first": 1,
        "guidance": 1.0,
        "shift": 1.0,
        "seeds": [0],
        "clips": 1,
        "thresholds": [-6.0],
    }
    return report.Result([dense, sparse], options, {"device": "none"}, grid, None, 1.0)


def made_up_comparison() -> report.Comparison:
    """A dense run, and two of each family at densities 0.5 and 0.25; all over 4 steps."""
    video = torch.rand(1, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0))

    def run(kept: float, quality: float, **setting: Any) -> report.Run:
        share = torch.full((4, 2, 2), kept)
        return report.Run(
            **setting,
            video=video,
            kept=share,
            attention_seconds=share.mean(dim=2) * 0.2,
            total_seconds=1.0 + kept,
            clip_psnr=[quality],
            relative_l2=0.1,
        )

    dense = run(1.0, 99.0)
    dense.clip_psnr = []
    settings = [("threshold", -1.0, -9.0), ("window", (1, 2, 2), (1, 1, 2)), ("top_blocks", 4, 2)]
    runs = [
        run(kept, 20.0 + 10 * number + 20 * kept, **{name: value})
        for number, (name, *values) in enumerate(settings)
        for kept, value in zip((0.5, 0.25), values, strict=True)
    ]
    return report.Comparison([dense, *runs], steps=4, dense_first=1)


@pytest.mark.slow
def test_demo_writes_one_self_contained_report(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "deep" / "report.html", tmp_path / "picture.png"
    options = ["--weights", str(tiny_weights), "--out", str(out), "--picture", str(picture), "--steps", "4"]
    options += ["--record", str(tmp_path / "record.json"), "--comparison-steps", "0"]
    code = demo.main([*options, "--dense-first", "1", "--thresholds", "-1", "-9", "--seeds", "4", "--device", "cpu"])
    assert code == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ +dense +100\.0%", printed, re.MULTILINE)
    assert re.search(r"^ +-1 +\d+\.\d%.* dB +0\.\d+$", printed, re.MULTILINE)
    page = out.read_text()
    assert page.count("data:image/webp;base64,") == 4  # dense, two thresholds, the difference
    assert page.count("<svg") >= 4
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", re.sub(r'xlink:href="#', 'href="#', page))
    found = re.search(r'<script type="application/json" id="results">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    results = json.loads(found.group(1))
    assert json.loads((tmp_path / "record.json").read_text()) == results
    dense, loose, strict = results["runs"]
    assert dense["kept"] == 1
    assert loose["kept"] < strict["kept"] <= 1
    assert loose["kept_by_step_and_layer"][1] == [1.0, 1.0]  # a dense step, then the one that writes the first map
    assert max(loose["kept_by_step_and_layer"][3]) < 1
    assert picture.stat().st_size > 10_000
    assert "Three ways" not in page
    assert "comparison" not in results


def record_of(tiny_weights: Path, folder: Path, *options: str) -> dict[str, Any]:
    path = folder / "record.json"
    fixed = ["--weights", str(tiny_weights), "--out", str(folder / "report.html"), "--record", str(path)]
    fixed += ["--steps", "4", "--dense-first", "1", "--thresholds", "-1", "--device", "cpu"]
    fixed += ["--comparison-steps", "0"]
    assert demo.main([*fixed, *options]) == 0
    return json.loads(path.read_text())


@pytest.mark.slow
def test_clips_denoised_together_are_those_denoised_alone(tiny_weights: Path, tmp_path: Path) -> None:
    alone = record_of(tiny_weights, tmp_path, "--seeds", "3", "8", "5")
    together = record_of(tiny_weights, tmp_path, "--seeds", "3", "8", "5", "--clips", "2")
    assert together["options"]["clips"] == 2
    for one, other in zip(alone["runs"], together["runs"], strict=True):
        # rounding differs with the batch, and a tile at the threshold may fall either way
        assert other["kept"] == pytest.approx(one["kept"], abs=0.01)
        assert other["psnr"] == (None if one["psnr"] is None else pytest.approx(one["psnr"], abs=1.0))
    assert together["runs"][1]["psnr_worst"] <= together["runs"][1]["psnr"]


@pytest.mark.slow
def test_demo_runs_in_half_precision(tiny_weights: Path, tmp_path: Path) -> None:
    single = record_of(tiny_weights, tmp_path, "--clips", "1")
    half = record_of(tiny_weights, tmp_path, "--clips", "1", "--dtype", "float16")
    assert (single["dtype"], half["dtype"]) == ("float32", "float16")
    assert half["runs"][1]["kept"] == pytest.approx(single["runs"][1]["kept"], abs=0.02)
    assert min(single["runs"][1]["psnr"], half["runs"][1]["psnr"]) > 60


@pytest.mark.slow
def test_demo_compares_the_families_at_equal_density(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "pictures" / "families.png"
    options = ["--comparison-steps", "3", "--windows", "1x1x2", "1x2x2", "--comparison-picture", str(picture)]
    record = record_of(tiny_weights, tmp_path, *options, "--thresholds", "-0.1", "-1", "-2")
    comparison = record["comparison"]
    assert (comparison["steps"], comparison["dense_first"]) == (3, 1)
    dense, *others = comparison["runs"]
    assert (dense["family"], dense["kept"], dense["psnr"]) == ("dense", 1.0, None)
    found = [(run["family"], run["setting"]) for run in others]
    assert found == [
        ("LiteAttention", "threshold -0.1"),
        ("LiteAttention", "threshold -2"),
        ("sliding tiles", "window 1x1x2"),
        ("sliding tiles", "window 1x2x2"),
        ("top-k blocks", "top 2 blocks"),
        ("top-k blocks", "top 4 blocks"),
    ]
    # one dense step, then 2 or 4 of 8 cubes
    assert [run["kept"] for run in others[2:]] == pytest.approx([0.5, 2 / 3, 0.5, 2 / 3], abs=1e-5)
    assert others[0]["kept"] < others[1]["kept"] < 1
    for run in comparison["runs"]:
        assert 0 < run["attention_seconds_per_step"] < run["step_seconds"]
    for run in others:
        assert 5 < run["psnr"] < 98
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert re.search(r"sliding tiles +window 1x1x2 +50\.0%", printed)
    assert re.search(r"top-k blocks +top 2 blocks +50\.0%", printed)
    assert "Three ways to choose the tiles" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_comparison_is_written_from_its_figures(tmp_path: Path) -> None:
    result = made_up_result()
    report.write_html(result, tmp_path / "without.html")
    result.comparison = made_up_comparison()
    report.write_html(result, tmp_path / "with.html")
    without, page = ((tmp_path / name).read_text() for name in ("without.html", "with.html"))
    assert page.count("<svg") == without.count("<svg") + 1
    assert "over 4 steps, the first 1 of them dense" in page
    row = "<td>top-k blocks</td><td>top 2 blocks</td><td>25.0%</td><td>312 ms</td><td>1.60x</td>"
    row += "<td>100 ms</td><td>4.00x</td><td>45.0 dB</td>"
    assert row in page
    assert row not in without
    facts = report.facts(result)["comparison"]
    assert [run["step_seconds"] for run in facts["runs"][:3]] == [0.5, 0.375, 0.3125]


def test_comparison_draws_quality_against_time_one_line_a_family() -> None:
    figure = report.comparison_figure(made_up_comparison())
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["LiteAttention"] == [[312.5, 25.0], [375.0, 30.0]]
    assert lines["sliding tiles"] == [[312.5, 35.0], [375.0, 40.0]]
    assert lines["top-k blocks"] == [[312.5, 45.0], [375.0, 50.0]]
    assert figure.axes[0].get_xlabel().startswith("time of a whole step (ms)")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == ["25%"] * 3 + ["50%"] * 3 + ["dense"]


def test_comparison_has_the_same_share_of_dense_steps() -> None:
    def shorter(*options: str) -> tuple[int, int]:
        args = demo.comparison_args(demo.parse_args(["--device", "cpu", *options]))
        return args.steps, args.dense_first

    assert shorter() == (5, 1)  # 3 of 20
    assert shorter("--comparison-steps", "20") == (20, 3)
    assert shorter("--steps", "4", "--dense-first", "2") == (4, 2)
    assert shorter("--steps", "9", "--dense-first", "7", "--comparison-steps", "2") == (2, 0)  # one step has to skip


def test_help_names_the_options_of_the_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.parse_args(["--help"])
    printed = capsys.readouterr().out
    for option in ("--windows", "--comparison-steps", "--comparison-picture"):
        assert option in printed


def test_seeds_make_up_the_clips_of_a_pass() -> None:
    assert demo.parse_args(["--device", "cpu"]).seeds == [27]
    assert demo.parse_args(["--device", "cpu", "--clips", "4"]).seeds == [27, 0, 1, 2]
    assert demo.parse_args(["--device", "cpu", "--clips", "4", "--seeds", "9"]).seeds == [9]


@pytest.mark.gpu
def test_demo_on_a_gpu_keeps_the_tiles_that_it_keeps_on_a_cpu(tmp_path: Path) -> None:
    options = ["--weights", str(EXAMPLE / "video_dit.safetensors"), "--out", str(tmp_path / "report.html")]
    options += ["--steps", "6", "--dense-first", "1", "--thresholds", "-6", "--clips", "1", "--comparison-steps", "0"]
    kept = {}
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.json"
        assert demo.main([*options, "--record", str(path), "--device", device]) == 0
        kept[device] = json.loads(path.read_text())["runs"][1]["kept"]
    assert kept["cuda"] == pytest.approx(kept["cpu"], abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clips", "0"], "at least 1"),
        (["--dtype", "float64"], "--dtype"),
        (["--thresholds", "1"], "at most 0"),
        (["--thresholds", "nan"], "at most 0"),
        (["--steps", "0"], "at least 1"),
        (["--dense-first", "19"], "no step that could skip"),
        (["--weights", "/nonexistent"], "does not exist"),
        (["--device", "tpu"], "--device"),
        (["--seeds", "-1"], "negative"),
        (["--threads", "0"], "at least 1"),
        (["--windows", "3x3"], "time x height x width"),
        (["--windows", "3x0x3"], "time x height x width"),
        (["--comparison-steps", "1"], "at least 2"),
        (["--comparison-picture", "p.png", "--comparison-steps", "0"], "nothing to show"),
    ],
)
def test_demo_refuses_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_says_plainly_when_a_kernel_is_missing(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Missing(LiteAttention):
        def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
            raise NotImplementedError("skip_attention: no backend runs float16, head_dim 64, on cuda:0")

    monkeypatch.setattr(demo, "LiteAttention", Missing)
    assert demo.main(["--weights", str(tiny_weights), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "no backend runs float16, head_dim 64, on cuda:0" in error
    assert "--device cpu" in error


def test_report_measures_time_over_the_skipping_passes_only() -> None:
    result = made_up_result()
    kept, spent = report.proportion(result.runs[1], result.runs[0])
    assert kept == pytest.approx(0.5)
    assert spent == pytest.approx(0.525)
    assert report.proportion(result.runs[0], result.runs[0]) == (1.0, 1.0)


def test_cubes_of_the_reach_picture_are_query_tiles() -> None:
    grid = (8, 8, 16)
    cubes = torch.from_numpy(report.cube_of_tokens(grid)).flatten()
    assert torch.equal(cubes[block_order(grid)], torch.arange(16).repeat_interleave(64))
