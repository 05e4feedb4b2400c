"""Skipped share against PSNR of LiteAttention's rule on the trained DiT, with the rule emulated in dense torch.

Every threshold denoises the same seeds as a dense run; a clip's PSNR is taken against its dense twin, videos in [0, 1].
The skipped share is the mean over all steps, layers, heads and both guidance branches, dense first steps included.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emulated import EmulatedLiteAttention
from model import VideoDiT, load_weights
from records import contact_sheet, psnr, relative_l2
from sampling import denoise, initial_noise

HERE = Path(__file__).parent


def run(
    model: VideoDiT,
    attention: list[EmulatedLiteAttention],
    noise: Tensor,
    labels: Tensor,
    args: argparse.Namespace,
    threshold: float | None,
    dense_first: int,
    chunk: int = 5,
) -> tuple[Tensor, Tensor]:
    """Clips in [0, 1] and the kept share `[steps, layers, heads]`, averaged over the clips; threshold None is dense."""
    clips, kept = [], []
    for x, y in zip(noise.split(chunk), labels.split(chunk), strict=True):
        for module in attention:
            module.reset_skip_state()
            module.set_threshold(0.0 if threshold is None else threshold)

        options = {"steps": args.steps, "guidance": args.guidance, "shift": args.shift}
        steps = denoise(model, x, y, null_class=model.config.null_class, **options)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.autocast):
            for step in range(args.steps):
                for module in attention:
                    module.enable_skip_optimization(threshold is not None and step >= dense_first)
                video = next(steps).clamp(-1, 1)
        clips.append((video.float() + 1) / 2)
        kept.append(torch.stack([torch.stack(module.kept_history) for module in attention], dim=1))
    return torch.cat(clips), torch.stack(kept).mean(dim=0)


def git_revision() -> str:
    """The checkout's revision, or 'unknown' outside one. No library runs here that could tell one."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def skipped_at(points: list[dict[str, Any]], target: float) -> float | None:
    """Skipped share at `target` dB, by linear interpolation between neighbouring points; None outside them."""
    ordered = sorted(points, key=lambda point: point["psnr_mean"])
    for low, high in itertools.pairwise(ordered):
        if low["psnr_mean"] <= target <= high["psnr_mean"]:
            part = (target - low["psnr_mean"]) / max(1e-9, high["psnr_mean"] - low["psnr_mean"])
            return float(low["skipped"] + part * (high["skipped"] - low["skipped"]))
    return None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weights", type=Path, default=HERE / "video_dit.safetensors")
    parser.add_argument("--out", type=Path, default=HERE / "evaluation.json")
    parser.add_argument("--sheet", type=Path, help="write dense and skipped samples as a PNG contact sheet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=10, help="clips; seed i has class i mod 10")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--shift", type=float, default=3.0)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[-0.5, -1, -2, -3, -4, -6, -8, -10, -14])
    parser.add_argument("--dense-first", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--autocast", action="store_true", help="bf16 instead of fp32 (TF32 matmuls on a GPU)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device(args.device)
    model = load_weights(args.weights).to(device)
    attention = [EmulatedLiteAttention() for _ in model.blocks]
    model.use_attention(attention)
    config = model.config
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    noise = initial_noise(seeds, (config.channels, config.frames, config.height, config.width)).to(device)
    labels = torch.tensor([seed % config.classes for seed in seeds], device=device)
    dense, _ = run(model, attention, noise, labels, args, None, 0)
    curves, sheets = [], [dense[:4]]
    for dense_first in args.dense_first:
        points = []
        for threshold in args.thresholds:
            video, kept = run(model, attention, noise, labels, args, threshold, dense_first)
            quality = psnr(video, dense)
            points.append({
                "threshold": threshold,
                "skipped": 1 - kept.mean().item(),
                "psnr_mean": quality.mean().item(),
                "psnr_min": quality.min().item(),
                "psnr": [round(x, 2) for x in quality.tolist()],
                "relative_l2": relative_l2(video, dense),
                "kept_by_step": [round(x, 4) for x in kept.mean(dim=(1, 2)).tolist()],
                "kept_by_layer": [round(x, 4) for x in kept.mean(dim=(0, 2)).tolist()],
                "kept_last_step_by_layer_head": [[round(x, 3) for x in row] for row in kept[-1].tolist()],
            })  # fmt: skip
            shares = f"dense first {dense_first}  threshold {threshold:6.1f}  skipped {points[-1]['skipped']:6.1%}"
            print(f"{shares}  PSNR mean {quality.mean():5.1f} min {quality.min():5.1f} dB", flush=True)
            if dense_first == args.dense_first[-1] and threshold in (-2, -4, -6):
                sheets.append(video[:4])
        at = {str(target): skipped_at(points, target) for target in (30, 35, 40)}
        shown = {target: None if share is None else round(share, 3) for target, share in at.items()}
        print(f"dense first {dense_first}: skipped at 30/35/40 dB", shown, flush=True)
        curves.append({"dense_first": dense_first, "skipped_at_db": at, "points": points})
    if args.sheet:
        contact_sheet(torch.cat(sheets) * 2 - 1, args.sheet)
    result = {
        "what": "skipped share against PSNR, rule emulated in dense torch",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git_revision": git_revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "compute": "bf16 autocast" if args.autocast else "fp32, TF32 matmuls" if device.type == "cuda" else "fp32",
        "weights": args.weights.name,
        "steps": args.steps, "guidance": args.guidance, "shift": args.shift, "seeds": seeds,
        "tokens": config.grid()[0] * config.grid()[1] * config.grid()[2],
        "curves": curves,
    }  # fmt: skip
    # one line for each point: small, and still readable in a diff
    text = json.dumps(result, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match.group().split()), text)
    args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
