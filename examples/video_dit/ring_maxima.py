"""What a running maximum of its own costs each split of a ring, on the demo's model.

Under ring attention the keys arrive split by split. A split's drop decisions can start from a running maximum of their
own, or carry on with the one of the splits before. This counts the tiles that both keep, and the error that both make
in attention's output, over a dense denoising whose queries and keys every variant sees alike.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from emulated import LOG2_E, TILE_M, TILE_N, tile_margins, visiting_order
from lite_attention.info import facts_of_run
from model import load_weights
from sampling import denoise, initial_noise

RANKS = (1, 2, 4)
MAXIMA = ("own", "carried")
THRESHOLDS = (-10.0, -6.0)


class Variant:
    """One way to decide, with its keep map."""

    def __init__(self, ranks: int, maximum: str, threshold: float) -> None:
        self.ranks, self.maximum, self.threshold = ranks, maximum, threshold
        self.keep: Tensor | None = None
        self.kept: list[float] = []
        self.error = 0.0

    def decide(self, tile_max: Tensor) -> Tensor:
        """Take a pass's largest scores, `[B, H, query_tiles, TILE_M, kv_tiles]`; returns the tiles it computes."""
        visited = torch.ones_like(tile_max[:, :, :, 0], dtype=torch.bool) if self.keep is None else self.keep
        self.kept.append(float(visited.float().mean()))
        query_tiles, kv_tiles = (size // self.ranks for size in visited.shape[-2:])
        within = visiting_order(query_tiles * TILE_M, kv_tiles * TILE_N)
        blocks = []
        for rank in range(self.ranks):
            rows = slice(rank * query_tiles, (rank + 1) * query_tiles)
            splits = [(rank - step) % self.ranks for step in range(self.ranks)]
            if self.maximum == "carried":
                order = torch.cat([within + split * kv_tiles for split in splits], -1)
                margins = tile_margins(tile_max[:, :, rows], visited[:, :, rows], order)
            else:
                margins = torch.cat(
                    [
                        tile_margins(tile_max[:, :, rows, :, columns], visited[:, :, rows, columns], within)
                        for columns in (slice(split * kv_tiles, (split + 1) * kv_tiles) for split in range(self.ranks))
                    ],
                    -1,
                )
            blocks.append(margins)
        self.keep = visited & (torch.cat(blocks, 2) > self.threshold)
        return visited


class Observer(nn.Module):
    """Dense attention that shows its scores to the variants."""

    def __init__(self) -> None:
        super().__init__()
        settings = itertools.product(RANKS, MAXIMA, THRESHOLDS)
        # On one rank there is nothing to carry.
        self.variants = [Variant(*setting) for setting in settings if setting[:2] != (1, "carried")]
        self.measure_errors = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        batch, heads, tokens, head_dim = q.shape
        scores = (q @ k.transpose(-1, -2)).mul_(head_dim**-0.5 * LOG2_E)
        tiled = scores.view(batch, heads, tokens // TILE_M, TILE_M, tokens // TILE_N, TILE_N)
        tile_max = tiled.amax(-1)
        weights = torch.softmax(scores / LOG2_E, -1)
        dense = weights @ v
        by_tile = weights.view(tiled.shape)
        for variant in self.variants:
            visited = variant.decide(tile_max)
            if self.measure_errors:
                masked = (by_tile * visited[:, :, :, None, :, None]).view(weights.shape)
                out = masked @ v / masked.sum(-1, keepdim=True)
                variant.error = float((out - dense).norm() / dense.norm())
        return dense.transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="denoising steps")
    parser.add_argument("--seed", type=int, default=27, help="of the noise; the last digit is the class")
    parser.add_argument("--record", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()

    model = load_weights(Path(__file__).parent / "video_dit.safetensors")
    config = model.config
    observers = [Observer() for _ in model.blocks]
    model.use_attention(observers)
    noise = initial_noise([args.seed], (config.channels, config.frames, config.height, config.width))
    label = torch.tensor([args.seed % config.classes])
    clips = denoise(model, noise, label, null_class=config.null_class, steps=args.steps, guidance=3.5, shift=3.0)
    for step in tqdm(range(args.steps), unit="step"):
        for observer in observers:
            observer.measure_errors = step == args.steps - 1
        next(clips)

    rows = []
    print("threshold  ranks  maximum  tiles kept  error of attention")
    for variants in zip(*(observer.variants for observer in observers), strict=True):
        first = variants[0]
        row = {
            "threshold": first.threshold,
            "ranks": first.ranks,
            "maximum": first.maximum,
            "kept_in_last_step": sum(variant.kept[-1] for variant in variants) / len(variants),
            "relative_error": sum(variant.error for variant in variants) / len(variants),
        }
        rows.append(row)
        print("{threshold:9g} {ranks:6d} {maximum:>8s} {kept_in_last_step:11.1%} {relative_error:19.4f}".format(**row))
    if args.record:
        facts = facts_of_run("python examples/video_dit/ring_maxima.py", on_gpu=False)
        facts |= {"steps": args.steps, "seed": args.seed, "rows": rows}
        args.record.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
