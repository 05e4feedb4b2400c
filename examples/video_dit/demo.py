"""Denoise the same videos densely and with LiteAttention at several thresholds, and write an HTML report.

All runs start from the same noise and use this package's own kernels; the dense one is LiteAttention with skipping
switched off. The report shows the videos side by side, what was skipped where, and what it cost and saved. A second,
shorter denoising compares LiteAttention with sliding tiles and with training-free top-k blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import report
from families import RememberedTiles, SlidingTiles, TileChoice, TopBlocks, cubes_seen, make_windows
from lite_attention import LiteAttention
from lite_attention.families.sliding_tile import SlidingTileMap
from lite_attention.info import facts_of_run
from lite_attention.ops.backends import availability, backends
from model import VideoDiT, load_weights
from records import psnr, relative_l2
from sampling import denoise, initial_noise

HERE = Path(__file__).parent
SEED = 27  # a seven that can be read
GPU_CLIPS = 16  # one clip has too few tokens and heads to occupy a large GPU
CPU_COMPARISON_STEPS = 5  # so that the comparison adds a minute and a half or so
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Stopwatch:
    """Runs from its making to `stop`. On a GPU it is the GPU's own time, read without making the GPU wait."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks = [self._mark()]

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self.marks.append(self._mark())

    def seconds(self) -> float:
        """To be asked once the GPU is done."""
        start, end = self.marks
        return float(start.elapsed_time(end) / 1000 if self.on_gpu else end - start)


class MeteredAttention(nn.Module):
    """Attention that notes each pass: how long it took and which share of the tiles each head computed."""

    def __init__(self, choice: TileChoice, heads: int) -> None:
        super().__init__()
        self.choice = choice
        self.heads = heads
        self.watches: list[Stopwatch] = []
        self.kept: list[Tensor] = []
        self.map_used: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        watch = Stopwatch(query.device)
        out: Tensor = self.choice(query, key, value)
        watch.stop()
        self.watches.append(watch)
        return out

    def note_map(self) -> None:
        """Note what the last pass computed; apart from the pass, so that it costs the run no time."""
        self.map_used = self.choice.take_map()
        all_tiles = torch.ones(self.heads)
        self.kept.append(
            all_tiles if self.map_used is None else all_tiles * self.map_used.float().mean(dim=(0, 2, 3)).cpu()
        )

    def seconds(self) -> list[float]:
        return [watch.seconds() for watch in self.watches]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def new_run(model: VideoDiT, steps: int, **setting: Any) -> report.Run:
    """A run with nothing in it yet; without a setting, the dense one."""
    config = model.config
    return report.Run(
        **setting,
        video=torch.empty(0, config.channels, config.frames, config.height, config.width),
        kept=torch.zeros(steps, config.depth, config.heads),
        attention_seconds=torch.zeros(steps, config.depth),
        total_seconds=0.0,
    )


def new_runs(model: VideoDiT, args: argparse.Namespace) -> list[report.Run]:
    """The dense run and one for each threshold."""
    return [new_run(model, args.steps, threshold=threshold) for threshold in [None, *args.thresholds]]


def comparison_args(args: argparse.Namespace) -> argparse.Namespace:
    """The options of the shorter denoising that compares the families: its share of dense first steps is the same."""
    dense_first = round(args.dense_first * args.comparison_steps / args.steps)
    changed = {"steps": args.comparison_steps, "dense_first": min(dense_first, max(0, args.comparison_steps - 2))}
    return argparse.Namespace(**{**vars(args), **changed})


def comparison_runs(model: VideoDiT, args: argparse.Namespace) -> list[report.Run]:
    """The dense run, LiteAttention at its loosest and strictest, and the others, two by two at equal density."""
    thresholds = sorted({min(args.thresholds), max(args.thresholds)}, reverse=True)
    windows = [sliding_windows(model, window, args) for window in args.windows]
    return [
        new_run(model, args.steps),
        *(new_run(model, args.steps, threshold=threshold) for threshold in thresholds),
        *(new_run(model, args.steps, window=window) for window in args.windows),
        *(new_run(model, args.steps, top_blocks=cubes_seen(window)) for window in windows),
    ]


def sliding_windows(model: VideoDiT, window: report.Size, args: argparse.Namespace) -> SlidingTileMap:
    return make_windows(window, model.config.grid(), model.config.head_dim, args.dtype, args.device)


def tile_choices(model: VideoDiT, run: report.Run, batch: int, args: argparse.Namespace) -> list[TileChoice]:
    """How the run chooses its tiles, one module for each block."""
    if run.window is not None:
        windows = sliding_windows(model, run.window, args)
        return [SlidingTiles(windows) for _ in model.blocks]
    if run.top_blocks is not None:
        return [TopBlocks(run.top_blocks) for _ in model.blocks]
    return [RememberedTiles(0.0 if run.threshold is None else run.threshold, batch) for _ in model.blocks]


def denoise_clips(
    model: VideoDiT, runs: list[report.Run], seeds: list[int], args: argparse.Namespace, progress: report.Progress
) -> None:
    """Denoise clips together, one for each seed, in every run and add them to the runs.

    The runs advance together, one step at a time in turn, so that a machine that grows slower or faster meanwhile
    (other programs, heat) treats them alike.
    """
    config = model.config
    noise = initial_noise(seeds, (config.channels, config.frames, config.height, config.width)).to(args.device)
    labels = torch.tensor([seed % config.classes for seed in seeds], device=args.device)
    options = {"steps": args.steps, "guidance": args.guidance, "shift": args.shift}
    streams = [denoise(model, noise, labels, null_class=config.null_class, **options) for _ in runs]
    batch = 2 * len(seeds)  # both branches of guidance
    meters = [
        [MeteredAttention(choice, config.heads) for choice in tile_choices(model, run, batch, args)] for run in runs
    ]
    clips = [noise] * len(runs)
    for step in range(args.steps):
        for i, run in enumerate(runs):
            model.use_attention(meters[i])
            for meter in meters[i]:
                meter.choice.skip(not run.dense and step >= args.dense_first)
            _wait(args.device)
            start = time.perf_counter()
            clips[i] = next(streams[i])
            _wait(args.device)
            run.total_seconds += time.perf_counter() - start
            for meter in meters[i]:
                meter.note_map()
            progress.done(run.name)
    for run, run_meters, clip in zip(runs, meters, clips, strict=True):
        run.video = torch.cat((run.video, (clip.float().cpu().clamp(-1, 1) + 1) / 2))
        kept = torch.stack([torch.stack(meter.kept) for meter in run_meters], dim=1)
        run.kept += kept * len(seeds) / len(args.seeds)
        run.attention_seconds += torch.tensor([meter.seconds() for meter in run_meters]).T
        if not run.last_maps:
            run.last_maps = [meter.map_used[0].cpu() for meter in run_meters if meter.map_used is not None]


def denoise_passes(
    model: VideoDiT,
    new: Callable[[VideoDiT, argparse.Namespace], list[report.Run]],
    args: argparse.Namespace,
) -> list[report.Run]:
    """New runs with all clips denoised, `args.clips` at a time, and compared with the dense run, which is the first."""
    passes = [args.seeds[first : first + args.clips] for first in range(0, len(args.seeds), args.clips)]
    warm_up = passes[:1] if args.device.type == "cuda" else []  # the first time around, libraries load, clocks rise
    runs = new(model, args)
    with report.Progress(len(runs) * len(warm_up + passes) * args.steps) as progress:
        for seeds in warm_up:
            denoise_clips(model, new(model, args), seeds, args, progress)
        for seeds in passes:
            denoise_clips(model, runs, seeds, args, progress)
    for run in runs[1:]:
        run.clip_psnr = psnr(run.video, runs[0].video).tolist()
        run.relative_l2 = relative_l2(run.video, runs[0].video)
    return runs


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def made_with(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs in order to judge the times."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    facts = facts_of_run("python examples/video_dit/demo.py", on_gpu=args.device.type == "cuda")
    return facts | {
        "device": facts["gpu"] or str(args.device),
        "processor": f"{processor}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads used",
        "dtype": dtype_name(args.dtype),
    }


def window_size(text: str) -> report.Size:
    """Read a window such as 3x1x4."""
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no time x height x width in cubes, such as 3x1x4")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("report/index.html"), help="the report to write")
    parser.add_argument("--weights", type=Path, default=HERE / "video_dit.safetensors")
    parser.add_argument("--curve", type=Path, default=HERE / "evaluation.json", help="committed curve shown beside")
    parser.add_argument("--picture", type=Path, help="also write an overview of the report as a PNG")
    parser.add_argument("--record", type=Path, help="also write the figures as JSON")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[-2.0, -6.0, -10.0], help="powers of two, at most 0"
    )
    parser.add_argument(
        "--windows",
        type=window_size,
        nargs="+",
        default=[(4, 3, 3), (3, 3, 3), (4, 4, 1)],
        metavar="TxHxW",
        help="sliding windows of the comparison, in cubes of 4 x 4 x 4 tokens; top-k takes as many cubes as each has",
    )
    parser.add_argument(
        "--comparison-steps",
        type=int,
        help="steps of the comparison with sliding tiles and top-k blocks; 5 on a CPU, --steps on a GPU if not given, "
        "0 for no comparison",
    )
    parser.add_argument("--comparison-picture", type=Path, help="also write the comparison's plot as a PNG")
    parser.add_argument("--clips", type=int, help="clips denoised together; 1 on a CPU and 16 on a GPU if not given")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="one clip each; its class is the last digit; if not given 27, and 0 and on to make up --clips",
    )
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--dense-first", type=int, default=3, help="steps before skipping starts")
    parser.add_argument("--guidance", type=float, default=3.5, help="classifier-free guidance; 1 is none")
    parser.add_argument("--shift", type=float, default=3.0, help="more spends more steps near the noise")
    on_gpu = any(backend.device_type == "cuda" and availability(backend)[0] for backend in backends())
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the model; float32 on a CPU and float16, as stored, on a GPU if not given"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; all cores if not given")
    args = parser.parse_args(argv)
    if any(not threshold <= 0 for threshold in args.thresholds):
        parser.error("--thresholds: powers of two, at most 0")
    if args.steps < 1 or args.dense_first < 0:
        parser.error("--steps must be at least 1 and --dense-first at least 0")
    if args.dense_first + 1 >= args.steps:
        parser.error("--dense-first leaves no step that could skip: the first skipping step still computes everything")
    if args.comparison_steps is not None and (args.comparison_steps < 0 or args.comparison_steps == 1):
        parser.error("--comparison-steps must be 0 or at least 2: LiteAttention's first step computes everything")
    if args.comparison_picture and args.comparison_steps == 0:
        parser.error("--comparison-picture: without --comparison-steps there is nothing to show")
    if args.seeds and any(seed < 0 for seed in args.seeds):
        parser.error("--seeds must not be negative")
    if args.clips is not None and args.clips < 1:
        parser.error("--clips must be at least 1")
    if args.shift <= 0 or not math.isfinite(args.guidance):
        parser.error("--shift must be positive and --guidance finite")
    if not args.weights.is_file():
        parser.error(f"--weights: {args.weights} does not exist")
    try:
        args.device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: {args.device.type} is not supported, expected cpu or cuda")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: this torch finds no CUDA device; use --device cpu")
    if args.threads is not None and args.threads < 1:
        parser.error("--threads must be at least 1")
    on_gpu = args.device.type == "cuda"
    args.dtype = DTYPES[args.dtype or ("float16" if on_gpu else "float32")]
    args.clips = args.clips or (GPU_CLIPS if on_gpu else 1)
    if args.comparison_steps is None:
        args.comparison_steps = args.steps if on_gpu else min(args.steps, CPU_COMPARISON_STEPS)
    args.seeds = args.seeds or [SEED, *range(args.clips - 1)]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_weights(args.weights).to(args.device, args.dtype)
    config = model.config
    grid = config.grid()
    print(
        f"video DiT: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.depth} blocks, "
        f"{config.heads} heads of {config.head_dim}, {grid[0]} x {grid[1]} x {grid[2]} = {math.prod(grid)} tokens, "
        f"{args.steps} steps, guidance {args.guidance:g}, {len(args.seeds)} clip(s), {args.clips} at a time, "
        f"{dtype_name(args.dtype)} on {args.device}"
    )
    try:
        # one small pass tells whether the kernels are there
        probe = torch.zeros(1, 256, 1, config.head_dim, dtype=args.dtype, device=args.device)
        LiteAttention()(probe, probe, probe)
    except RuntimeError as error:
        print(f"\nThis build cannot run the demo on {args.device}: {error}", file=sys.stderr)
        print("Use --device cpu for the CPU kernels.", file=sys.stderr)
        return 2
    started = time.perf_counter()
    runs = denoise_passes(model, new_runs, args)
    comparison = None
    if args.comparison_steps:
        shorter = comparison_args(args)
        comparison = report.Comparison(
            runs=denoise_passes(model, comparison_runs, shorter), steps=shorter.steps, dense_first=shorter.dense_first
        )
    result = report.Result(
        runs=runs,
        options={name: value for name, value in vars(args).items() if name in report.OPTIONS},
        made_with=made_with(args),
        grid=grid,
        curve=json.loads(args.curve.read_text()) if args.curve.is_file() else None,
        seconds=time.perf_counter() - started,
        comparison=comparison,
    )
    print(report.table(result))
    print(report.proportion_sentence(result))
    if comparison:
        print(f"\n{report.comparison_sentence(comparison)}\n{report.comparison_table(comparison)}")
    report.write_html(result, args.out)
    print(f"report: {args.out}  ({result.seconds:.0f} s)")
    if args.picture:
        report.write_picture(result, args.picture)
    if args.comparison_picture and comparison:
        report.write_comparison_picture(comparison, args.comparison_picture)
    if args.record:
        args.record.write_text(json.dumps(report.facts(result), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
