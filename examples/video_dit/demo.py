"""Denoise the same videos densely and with LiteAttention at several thresholds, and write an HTML report.

All runs start from the same noise and use this package's own kernels; the dense one is LiteAttention with skipping
switched off. The report shows the videos side by side, what was skipped where, and what it cost and saved.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import report
from lite_attention import LiteAttention
from model import VideoDiT, load_weights
from records import git_revision, psnr, relative_l2
from sampling import denoise, initial_noise

HERE = Path(__file__).parent


class MeteredAttention(nn.Module):
    """A LiteAttention that notes each pass: how long it took and which share of the tiles each head computed."""

    def __init__(self, threshold: float | None) -> None:
        super().__init__()
        self.attention = LiteAttention(threshold=0.0 if threshold is None else threshold)
        self.skipping = True
        self.seconds: list[float] = []
        self.kept: list[Tensor] = []
        self.map: Tensor | None = None
        self.map_used: Tensor | None = None

    def skip(self, enable: bool) -> None:
        self.skipping = enable
        self.attention.enable_skip_optimization(enable)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # the map that this pass uses was written by the one before; the first pass has none and computes everything
        heads = torch.ones(query.shape[2])
        self.kept.append(heads if self.map is None or not self.skipping else self.map.float().mean(dim=(0, 2, 3)).cpu())
        self.map_used = self.map
        _wait(query.device)
        start = time.perf_counter()
        out = self.attention(query, key, value)
        _wait(query.device)
        self.seconds.append(time.perf_counter() - start)
        if self.skipping:
            self.map = self.attention.keep_map()
        if not isinstance(out, Tensor):
            raise TypeError("MeteredAttention: expected one tensor from the attention")
        return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def new_run(threshold: float | None, model: VideoDiT, args: argparse.Namespace) -> report.Run:
    """A run with nothing in it yet; threshold None is dense."""
    config = model.config
    return report.Run(
        threshold=threshold,
        video=torch.empty(0, config.channels, config.frames, config.height, config.width),
        kept=torch.zeros(args.steps, config.depth, config.heads),
        attention_seconds=torch.zeros(args.steps, config.depth),
        total_seconds=0.0,
    )


def denoise_clip(
    model: VideoDiT, runs: list[report.Run], seed: int, args: argparse.Namespace, progress: report.Progress
) -> None:
    """Denoise one clip in every run and add it to them.

    The runs advance together, one step at a time in turn, so that a machine that grows slower or faster meanwhile
    (other programs, heat) treats them alike.
    """
    config = model.config
    noise = initial_noise([seed], (config.channels, config.frames, config.height, config.width)).to(args.device)
    label = torch.tensor([seed % config.classes], device=args.device)
    options = {"steps": args.steps, "guidance": args.guidance, "shift": args.shift}
    streams = [denoise(model, noise, label, null_class=config.null_class, **options) for _ in runs]
    meters = [[MeteredAttention(run.threshold) for _ in model.blocks] for run in runs]
    clips = [noise] * len(runs)
    for step in range(args.steps):
        for i, run in enumerate(runs):
            model.use_attention(meters[i])
            for meter in meters[i]:
                meter.skip(run.threshold is not None and step >= args.dense_first)
            start = time.perf_counter()
            clips[i] = next(streams[i])
            _wait(args.device)
            run.total_seconds += time.perf_counter() - start
            progress.done(run.name)
    for run, run_meters, clip in zip(runs, meters, clips, strict=True):
        run.video = torch.cat((run.video, (clip.float().cpu().clamp(-1, 1) + 1) / 2))
        run.kept += torch.stack([torch.stack(meter.kept) for meter in run_meters], dim=1) / len(args.seeds)
        run.attention_seconds += torch.tensor([meter.seconds for meter in run_meters]).T
        if not run.last_maps:
            run.last_maps = [meter.map_used[0].cpu() for meter in run_meters if meter.map_used is not None]


def environment(args: argparse.Namespace) -> dict[str, str]:
    """What a reader needs in order to judge the times."""
    from lite_attention import __version__

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    facts = {
        "device": str(args.device),
        "processor": f"{processor}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads used",
        "dtype": "float32",
        "lite_attention": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git revision": git_revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if args.device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(args.device)
    return facts


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[27], help="one clip each; its class is the last digit")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--dense-first", type=int, default=3, help="steps before skipping starts")
    parser.add_argument("--guidance", type=float, default=3.5, help="classifier-free guidance; 1 is none")
    parser.add_argument("--shift", type=float, default=3.0, help="more spends more steps near the noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; all cores if not given")
    args = parser.parse_args(argv)
    if any(not threshold <= 0 for threshold in args.thresholds):
        parser.error("--thresholds: powers of two, at most 0")
    if args.steps < 1 or args.dense_first < 0:
        parser.error("--steps must be at least 1 and --dense-first at least 0")
    if args.dense_first + 1 >= args.steps:
        parser.error("--dense-first leaves no step that could skip: the first skipping step still computes everything")
    if any(seed < 0 for seed in args.seeds):
        parser.error("--seeds must not be negative")
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
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_weights(args.weights).to(args.device)
    config = model.config
    grid = config.grid()
    print(
        f"video DiT: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.depth} blocks, "
        f"{config.heads} heads of {config.head_dim}, {grid[0]} x {grid[1]} x {grid[2]} = {math.prod(grid)} tokens, "
        f"{args.steps} steps, guidance {args.guidance:g}, {len(args.seeds)} clip(s) on {args.device}"
    )
    try:
        # one small pass tells whether the kernels are there
        probe = torch.zeros(1, 256, 1, config.head_dim, device=args.device)
        LiteAttention()(probe, probe, probe)
    except NotImplementedError as error:
        print(f"\nThis build cannot run the demo on {args.device}: {error}", file=sys.stderr)
        print("Use --device cpu for the CPU kernels.", file=sys.stderr)
        return 2
    started = time.perf_counter()
    runs = [new_run(threshold, model, args) for threshold in [None, *args.thresholds]]
    with report.Progress(len(runs) * len(args.seeds) * args.steps) as progress:
        for seed in args.seeds:
            denoise_clip(model, runs, seed, args, progress)
    for run in runs[1:]:
        run.psnr = psnr(run.video, runs[0].video).mean().item()
        run.relative_l2 = relative_l2(run.video, runs[0].video)
    result = report.Result(
        runs=runs,
        options={name: value for name, value in vars(args).items() if name in report.OPTIONS},
        environment=environment(args),
        grid=grid,
        curve=json.loads(args.curve.read_text()) if args.curve.is_file() else None,
        seconds=time.perf_counter() - started,
    )
    print(report.table(result))
    print(report.proportion_sentence(result))
    report.write_html(result, args.out)
    print(f"report: {args.out}  ({result.seconds:.0f} s)")
    if args.picture:
        report.write_picture(result, args.picture)
    if args.record:
        args.record.write_text(json.dumps(report.facts(result), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
