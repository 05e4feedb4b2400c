"""Denoise one video on several processes, and compare it with the video that a single one makes.

    torchrun --nproc-per-node 2 examples/video_dit/parallel.py

Each process holds a share of the tokens from the first block of the transformer to its last layer; only attention needs
the others' tokens, and DistributedLiteAttention fetches them. One process computes on one GPU, or without GPUs on its
share of the cores. By Ulysses, the default, processes exchange tokens for heads, and decide as one process does which
tiles to skip. In a ring (--ring) the keys travel and each process's share of them has a skip state of its own, so other
tiles are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm  # type: ignore[import-untyped]

from lite_attention import LiteAttention
from lite_attention.parallel.distributed import DistributedLiteAttention
from lite_attention.parallel.mesh import SequenceMesh, sequence_mesh
from lite_attention.parallel.shards import gather_sequence, shard_sequence
from model import VideoDiT, load_weights
from records import contact_sheet, psnr
from sampling import denoise, initial_noise

HERE = Path(__file__).parent
SEED = 27  # a seven that can be read
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Attention = LiteAttention | DistributedLiteAttention


class SplitTokens:
    """Within the block, the model's tokens are split among the ranks from its first block to its last layer."""

    def __init__(self, model: VideoDiT, mesh: SequenceMesh) -> None:
        self.mesh = mesh
        self.tokens = 0
        first, *others = model.blocks
        self._hooks = [
            first.register_forward_pre_hook(self._split_all),
            *(block.register_forward_pre_hook(self._split_positions) for block in others),
            model.patch_out.register_forward_hook(self._put_together),
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _split_all(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = self._split_positions(block, args)
        self.tokens = x.shape[1]
        return shard_sequence(x, self.mesh, 1), *others

    def _split_positions(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, shared, cos, sin = args  # Block.forward's
        return x, shared, shard_sequence(cos, self.mesh, 0), shard_sequence(sin, self.mesh, 0)

    def _put_together(self, _: nn.Module, __: tuple[Any, ...], patches: Tensor) -> Tensor:
        return gather_sequence(patches, self.mesh, self.tokens, 1)


class Result:
    """A denoised video, the tiles that one more step would compute, the share it would skip, and the time."""

    def __init__(self, video: Tensor, maps: list[Tensor], skipped: Tensor, seconds: float) -> None:
        self.video = video
        self.maps = maps
        self.skipped = skipped
        self.seconds = seconds


def run(model: VideoDiT, layers: Sequence[Attention], args: argparse.Namespace, name: str | None) -> Result:
    """Denoise; with a name, a progress bar shows it."""
    config = model.config
    model.use_attention(layers)
    noise = initial_noise(args.seeds, (config.channels, args.frames, config.height, config.width)).to(args.device)
    labels = torch.tensor([seed % config.classes for seed in args.seeds], device=args.device)
    options = {"steps": args.steps, "guidance": args.guidance, "shift": args.shift}
    stream = denoise(model, noise, labels, null_class=config.null_class, **options)
    start = time.perf_counter()
    clips = noise
    for step in tqdm(range(args.steps), desc=name, unit="step", disable=name is None):
        for layer in layers:
            layer.enable_skip_optimization(step >= args.dense_first)
        clips = next(stream)
        if args.device.type == "cuda":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    maps = [layer.keep_map() for layer in layers]
    skipped = torch.stack([layer.skip_fraction() for layer in layers]).mean()
    return Result((clips.float().cpu().clamp(-1, 1) + 1) / 2, maps, skipped.cpu(), seconds)


def maps_of_all_heads(layers: Sequence[Attention], result: Result, heads: int, mesh: SequenceMesh) -> list[Tensor]:
    """Under Ulysses, the maps of every layer with all heads in the model's order, on every rank."""
    whole = []
    for layer, keep in zip(layers, result.maps, strict=True):
        if not isinstance(layer, DistributedLiteAttention):
            raise TypeError(f"expected DistributedLiteAttention, got {type(layer).__name__}")
        of_rank = torch.zeros(keep.shape[0], heads, *keep.shape[2:], dtype=torch.int32, device=keep.device)
        of_rank[:, layer.local_heads(heads)] = keep.int()
        dist.all_reduce(of_rank)
        whole.append(of_rank.bool())
    return whole


def compare(parallel: Result, single: Result, maps: list[Tensor] | None) -> list[str]:
    """What the comparison found, in sentences."""
    difference = float((parallel.video - single.video).abs().max())
    quality = float(psnr(parallel.video, single.video).min())
    equal = " (equal bits)" if torch.equal(parallel.video, single.video) else ""
    lines = [
        f"one process: {single.seconds:.1f} s, one more step would skip {single.skipped:.1%} of the tiles",
        f"videos: largest difference {difference:.2e} of 1{equal}, PSNR {quality:.1f} dB (99 stands for equal)",
    ]
    if maps is not None:
        different = sum(int((one != other).sum()) for one, other in zip(maps, single.maps, strict=True))
        total = sum(one.numel() for one in maps)
        lines.append(f"skip states: {different} of {total} tiles differ")
    return lines


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ulysses", type=int, help="processes that share heads; all that the ring leaves if not given")
    parser.add_argument("--ring", type=int, default=1, help="processes, or groups of them, that pass keys round; 1")
    parser.add_argument("--head-chunks", type=int, default=1, help="turns in which a process computes its heads; 1")
    parser.add_argument("--threshold", type=float, default=-10.0, help="powers of two, at most 0; -10")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps; 20")
    parser.add_argument("--dense-first", type=int, default=3, help="steps before skipping starts; 3")
    parser.add_argument("--frames", type=int, help="a multiple of 4 up to the model's, which is 16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[SEED], help="one clip each, of its last digit's class")
    parser.add_argument("--guidance", type=float, default=3.5, help="classifier-free guidance; 3.5, and 1 is none")
    parser.add_argument("--shift", type=float, default=3.0, help="more spends more steps near the noise; 3")
    parser.add_argument("--weights", type=Path, default=HERE / "video_dit.safetensors")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda if every process can have a GPU, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model; float16 on GPUs, else float32")
    parser.add_argument("--no-check", action="store_true", help="do not also denoise on one process")
    parser.add_argument("--picture", type=Path, help="write eight frames of each clip as a PNG")
    args = parser.parse_args(argv)
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun, for instance: torchrun --nproc-per-node 2 examples/video_dit/parallel.py")
    ranks, on_node = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if args.ring < 1 or ranks % args.ring:
        parser.error(f"--ring is {args.ring}, expected a divisor of the {ranks} processes")
    args.ulysses = args.ulysses or ranks // args.ring
    if args.ring * args.ulysses != ranks:
        parser.error(f"--ring {args.ring} times --ulysses {args.ulysses} is not {ranks}, the number of processes")
    if args.steps < 1 or not 0 <= args.dense_first < args.steps:
        parser.error("--steps must be at least 1, and --dense-first at least 0 and less")
    if not args.threshold <= 0:
        parser.error("--threshold: powers of two, at most 0")
    if not args.weights.is_file():
        parser.error(f"--weights: {args.weights} does not exist")
    gpus = torch.cuda.device_count()
    if args.device == "cuda" and gpus < on_node:
        parser.error(f"--device cuda: {gpus} GPUs for {on_node} processes of this machine, expected one each")
    on_gpus = args.device == "cuda" or (args.device is None and gpus >= on_node)
    args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    args.dtype = DTYPES[args.dtype or ("float16" if on_gpus else "float32")]
    return args


def denoise_together(model: VideoDiT, mesh: DeviceMesh, args: argparse.Namespace) -> tuple[Result, list[Tensor] | None]:
    """The video that all processes make, and under Ulysses the skip state of all heads."""
    place = sequence_mesh(mesh, "parallel.py")
    layers = [
        DistributedLiteAttention(
            mesh, threshold=args.threshold, max_batch_size=2 * len(args.seeds), head_chunks=args.head_chunks
        ).to(args.device)
        for _ in model.blocks
    ]
    name = f"{place.shards} processes" if dist.get_rank() == 0 else None
    with SplitTokens(model, place):
        result = run(model, layers, args, name)
    return result, maps_of_all_heads(layers, result, model.config.heads, place) if place.ring.size == 1 else None


def denoise_alone(model: VideoDiT, args: argparse.Namespace) -> Result:
    """The video that one process makes; the others wait for it and use no cores meanwhile."""
    layers = [LiteAttention(threshold=args.threshold, max_batch_size=2 * len(args.seeds)) for _ in model.blocks]
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    result = run(model, [layer.to(args.device) for layer in layers], args, "one process")
    torch.set_num_threads(threads)
    return result


@contextlib.contextmanager
def process_group(device: torch.device) -> Any:
    """All processes that torchrun started, as one group."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    model = load_weights(args.weights).to(args.device, args.dtype)
    args.frames = args.frames or model.config.frames
    with process_group(args.device):
        leads = dist.get_rank() == 0
        mesh = init_device_mesh(args.device.type, (args.ring, args.ulysses), mesh_dim_names=("ring", "ulysses"))
        parallel, maps = denoise_together(model, mesh, args)
        shares = [torch.zeros((), device=args.device) for _ in range(mesh.size())]
        dist.all_gather(shares, parallel.skipped.to(args.device))
        if leads:
            skipped = ", ".join(f"{float(share):.1%}" for share in shares)
            method = f"{args.ring} in the ring times {args.ulysses} by Ulysses"
            print(f"{mesh.size()} processes on {args.device.type}, {method}: {parallel.seconds:.1f} s")
            print(f"tiles that one more step would skip, by rank: {skipped}", flush=True)
            if args.picture:
                contact_sheet(2 * parallel.video - 1, args.picture)
                print(f"wrote {args.picture}")
            if not args.no_check:
                print("\n".join(compare(parallel, denoise_alone(model, args), maps)), flush=True)
        dist.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main())
