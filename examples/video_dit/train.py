"""Train the video DiT on generated clips; writes a JSON-lines log, a resumable checkpoint and fp16 weights.

Two stages: short clips (4 frames) teach appearance cheaply, full clips (16 frames) teach motion. From the second
stage on, a small penalty on the number of tiles that LiteAttention's rule would keep can be added to the flow loss.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from data import MovingDigits
from model import VideoDiT, VideoDiTConfig, load_weights, save_weights
from records import contact_sheet
from sampling import initial_noise, sample
from sparsity import soft_density


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("video_dit_run"), help="folder for log, checkpoint, weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-short", type=int, default=4000, help="steps on 4-frame clips")
    parser.add_argument("--steps-full", type=int, default=18600, help="steps on full clips")
    parser.add_argument("--batch-short", type=int, default=96)
    parser.add_argument("--batch-full", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak rate of stage 1")
    parser.add_argument("--lr-full", type=float, default=8e-4, help="peak rate of stage 2")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--ema", type=float, default=0.9985)
    parser.add_argument("--label-drop", type=float, default=0.1)
    parser.add_argument("--time-mean", type=float, default=1.0, help="full clips: mean logit of the noise level")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--qk-gain", type=float, default=VideoDiTConfig.qk_gain)
    parser.add_argument("--qk-bias", type=float, default=VideoDiTConfig.qk_bias)
    parser.add_argument("--density-weight", type=float, default=0.01, help="weight of the kept-tile penalty in stage 2")
    parser.add_argument("--density-start", type=int, default=1000, help="full-clip steps of its ramp")
    parser.add_argument("--density-threshold", type=float, default=-8.0, help="threshold it aims at (log2)")
    parser.add_argument("--density-width", type=float, default=2.0)
    parser.add_argument("--density-tiles", type=int, default=4, help="query tiles looked at in each step")
    parser.add_argument("--init", type=Path, help="start from these weights instead of a random model")
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds; then save a checkpoint and exit")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm up, then a cosine to a tenth within stage 1 and to a hundredth within stage 2."""
    if step < args.steps_short:
        peak, progress, floor = args.lr, step / args.steps_short, 0.3
        warm = min(1.0, (step + 1) / args.warmup)
    else:
        peak, progress, floor = args.lr_full, (step - args.steps_short) / args.steps_full, 0.01
        warm = min(1.0, (step - args.steps_short + 1) / args.warmup)
    return float(peak * warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))))


def draw_times(count: int, device: torch.device, mean: float) -> Tensor:
    """Logit-normal noise levels: few at the ends, where there is little to learn."""
    return torch.sigmoid(torch.randn(count, device=device) + mean)


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    started = time.time()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    # torch 2.11's cuDNN attention returns wrong gradients for the transposed output gradient that a BSHD model makes
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    if device.type == "cuda":
        torch.backends.cuda.enable_math_sdp(False)

    if args.init:
        model = load_weights(args.init).requires_grad_(True).train()
    else:
        sizes = {"dim": args.dim, "depth": args.depth, "heads": args.heads}
        model = VideoDiT(VideoDiTConfig(**sizes, qk_gain=args.qk_gain, qk_bias=args.qk_bias))
    config = model.config
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    matrices = [p for p in model.parameters() if p.ndim == 2 and min(p.shape) > 32]
    others = [p for p in model.parameters() if not (p.ndim == 2 and min(p.shape) > 32)]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=device.type == "cuda")
    step, trained_seconds = 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        step, trained_seconds = saved["step"], saved["seconds"]

    density_of = soft_density
    if not args.no_compile:
        torch._dynamo.config.recompile_limit = 64
        for block in model.blocks:
            block.compile(dynamic=False)
        density_of = torch.compile(soft_density, dynamic=False)
    data = MovingDigits(device, config.height, seed=args.seed + 1000 * step)
    tile_rng = torch.Generator().manual_seed(args.seed + step)
    total = args.steps_short + args.steps_full
    log = (args.out / "train_log.jsonl").open("a")

    def record(**facts: object) -> None:
        print(json.dumps(facts), flush=True)
        log.write(json.dumps(facts) + "\n")
        log.flush()

    record(
        event="resume" if step else "start",
        step=step,
        parameters=sum(p.numel() for p in model.parameters()),
        torch=torch.__version__,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        options={name: value for name, value in vars(args).items() if not isinstance(value, Path)},
    )
    running: list[Tensor] = []
    densities: list[Tensor] = []
    averages: list[Tensor] = list(ema.parameters())
    weights: list[Tensor] = list(model.parameters())
    window = time.time()
    while step < total and time.time() - started < args.stop_after:
        short = step < args.steps_short
        frames = 4 if short else config.frames
        count = args.batch_short if short else args.batch_full
        stride = 1 + int(torch.randint(4, (), generator=tile_rng)) if short else 1
        clean, label = data.batch(count, frames, stride)
        label = torch.where(torch.rand(count, device=device) < args.label_drop, config.null_class, label)
        level = draw_times(count, device, 0.2 if short else args.time_mean)
        noise = torch.randn_like(clean)
        mixed = torch.lerp(clean, noise, level.view(-1, 1, 1, 1, 1))
        ramp = 0.0 if short else min(1.0, (step - args.steps_short) / max(1, args.density_start))
        qk: list[tuple[Tensor, Tensor]] | None = [] if args.density_weight * ramp > 0 else None
        with torch.autocast(device.type, torch.bfloat16):
            velocity = model(mixed, level, label, qk)
        loss = flow = (velocity.float() - (noise - clean)).square().mean()
        if qk is not None:
            tiles = config.grid(frames)[0] * config.grid()[1] * config.grid()[2] // 64
            looked_at = torch.randperm(tiles, generator=tile_rng)[: args.density_tiles].to(device)
            density = torch.stack(
                [density_of(q, k, looked_at, args.density_threshold, args.density_width) for q, k in qk]
            ).mean()
            loss = flow + args.density_weight * ramp * density
            densities.append(density.detach())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        # follow closely while there is little history, then average over about 1 / (1 - ema) steps
        torch._foreach_lerp_(averages, weights, 1 - min(args.ema, (step + 1) / (step + 10)))
        running.append(flow.detach())
        step += 1
        if step % args.log_every == 0 or step in (1, total):
            mean_loss = torch.stack(running).mean().item()
            now = time.time()
            record(
                step=step,
                stage="short" if short else "full",
                loss=round(mean_loss, 5),
                soft_density=round(torch.stack(densities).mean().item(), 4) if densities else None,
                lr=round(rate, 7),
                grad_norm=round(norm.item(), 4),
                ms_per_step=round(1000 * (now - window) / len(running), 1),
                seconds=round(trained_seconds + now - started, 1),
            )
            if not math.isfinite(mean_loss):
                raise SystemExit("train: the loss is not finite")
            running, densities, window = [], [], now

    trained_seconds += time.time() - started
    state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "step": step, "seconds": trained_seconds}, checkpoint)
    save_weights(args.out / "video_dit.safetensors", ema.state_dict(), config, steps=str(step))
    with torch.autocast(device.type, torch.bfloat16):
        labels = torch.arange(config.classes, device=device)
        noise = initial_noise(list(range(config.classes)), (3, config.frames, config.height, config.width)).to(device)
        few = 4 if device.type == "cpu" else 24
        video = sample(ema, noise, labels, null_class=config.null_class, steps=few, guidance=2.0, shift=2.0)
    contact_sheet(video.float(), args.out / "samples.png")
    gains = {name: round(p.mean().item(), 3) for name, p in ema.named_parameters() if name.endswith("norm.gain")}
    record(event="saved", step=step, seconds=round(trained_seconds, 1), qk_gain_means=gains)


if __name__ == "__main__":
    main()
