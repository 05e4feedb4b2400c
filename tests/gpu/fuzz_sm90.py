"""Random small problems through the GPU's kernels, in one process; each is judged against the oracle.

    python tests/gpu/fuzz_sm90.py --cases 10000 --output fuzz.json
    python tests/gpu/fuzz_sm90.py --seed 0 --first 4711 --cases 1

The second line runs one case again: a case follows from the seed and its number alone, and a failure prints that line.
Values are judged element by element, by what rounding the weights and the output to the inputs' dtype can cost.
Decisions equal the oracle's, except where a margin is within rounding of the threshold; such tiles are counted. Of some
problems q or k holds NaN: a row is NaN exactly where the oracle's is, and a tile with a margin of NaN is kept.
Exit status 1 if any case fails. ``--device cpu`` puts the same questions to the CPU's kernels.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lite_attention import (
    attention,
    merge_attention,
    pack_keep_map,
    reference,
    skip_attention,
    top_k_map,
    unpack_keep_map,
)
from lite_attention.maps.keep_map import WORD_BITS

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.fuzz_problems import MASKED, Problem, random_problem
from support.inputs import (
    DTYPES,
    GPU,
    GPU_DTYPES,
    make_map,
    make_qkv,
    poisoned_memory,
    score_rounding,
)
from support.masks import tile_lens
from support.scores import make_scores

MOST_UNSURE = 0.01  # of all visited tiles
REPORT_EVERY = 100


def laid_out(layout: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values in another layout; a fused one only where q, k and v have one shape."""
    match layout:
        case "BHSD":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        case "fused" if q.shape == k.shape:
            q, k, v = torch.stack((q, k, v), 3).unbind(3)
        case "wide rows":
            q, k, v = (torch.nn.functional.pad(x, (8, 16))[..., 8:-16] for x in (q, k, v))
        case "expanded batch":
            k, v = (x[:1].expand(x.shape) for x in (k, v))
    return q, k, v


@dataclass
class Judgement:
    """What was wrong with one case, and how many of its decisions were too close to call."""

    wrong: list[str] = field(default_factory=list)
    visited: int = 0
    unsure: int = 0

    def expect(self, name: str, holds: Tensor) -> None:
        if not bool(holds.all()):
            self.wrong.append(name)


def spoil(q: Tensor, k: Tensor, problem: Problem) -> None:
    """Put a few NaN where the problem says."""
    if problem.spoilt is None:
        return
    tensor = q if problem.spoilt == "q" else k
    random_numbers = torch.Generator().manual_seed(problem.seed)
    for _ in range(1 + problem.seed % 3):
        place = tuple(int(torch.randint(size, (), generator=random_numbers)) for size in tensor.shape)
        tensor[place] = math.nan


def rounding(q: Tensor, k: Tensor, scale: float) -> Any:
    """What rounding can cost a score that is a number."""
    return score_rounding(q.nan_to_num(), k.nan_to_num(), scale)


def judge_values(
    judgement: Judgement,
    results: tuple[Tensor, Tensor],
    problem: Problem,
    qkv: tuple[Tensor, Tensor, Tensor],
    keep: Tensor | None,
    kv_lens: Tensor | None,
    masks: dict[str, Any] | None = None,
) -> None:
    out, lse = results
    masks = masks or {}
    q, k, v = qkv
    exact_out, exact_lse = reference.attention(q, k, v, keep, kv_lens, problem.scale, **masks)
    weighted, _ = reference.attention(q, k, v.abs(), keep, kv_lens, problem.scale, **masks)  # sum of weight * |value|
    eps = torch.finfo(out.dtype).eps
    score_error = rounding(q, k, problem.scale)
    # Half an eps for each weight, half for the output, and the scores' own error above and below the fraction line.
    allowed = (1.05 * eps + 2 * score_error) * weighted + 1e-6
    if out.dtype == torch.float16:  # weights under its normal range are rounded to multiples of 2**-24
        allowed += problem.case.kv_len * 2.0**-25 * v.abs().max()
    judgement.expect("out", ((out - exact_out).abs() <= allowed) | (out.isnan() & exact_out.isnan()))
    empty = exact_lse == -math.inf
    judgement.expect("out of empty rows", (out == 0) | ~empty.transpose(1, 2).unsqueeze(-1))
    judgement.expect("lse of empty rows", (lse == -math.inf) == empty)
    error = (lse - exact_lse).masked_fill(empty | (lse.isnan() & exact_lse.isnan()), 0.0).abs()
    few = 4 * torch.finfo(torch.float32).eps * exact_lse.nan_to_num().abs()
    judgement.expect("lse", error <= 2e-5 + score_error + few)


def judge_decisions(
    judgement: Judgement,
    next_keep: Tensor,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    keep: Tensor,
    must_keep: Tensor | None,
    kv_lens: Tensor | None,
    threshold: Tensor,
) -> Tensor:
    """Returns the map of visited tiles."""
    expected, margins = reference.decisions(q, k, keep, must_keep, kv_lens, threshold, problem.scale)
    visited = margins != -math.inf  # NaN is visited
    distance = (margins - threshold.double().reshape(-1, 1, 1)).abs()
    unsure = visited & (distance <= rounding(q, k, problem.scale))
    judgement.visited, judgement.unsure = int(visited.sum()), int(unsure.sum())
    judgement.expect("next_keep", ((next_keep ^ expected) & ~pack_keep_map(unsure)) == 0)
    return pack_keep_map(visited)


def judge_merge(judgement: Judgement, problem: Problem, q: Tensor) -> None:
    case, device = problem.case, q.device
    parts = 1 + problem.seed % 5
    random_numbers = torch.Generator(device).manual_seed(problem.seed)
    outs = [q * (part + 1) for part in range(parts)]
    lses = [
        5 * torch.randn(case.batch, case.heads, case.query_len, generator=random_numbers, device=device) for _ in outs
    ]
    for lse in lses:
        lse[torch.rand(lse.shape, generator=random_numbers, device=device) < 0.2] = -math.inf
    with poisoned_memory(device):
        out, lse = merge_attention(outs, lses)
    exact_out, exact_lse = reference.merge_attention(outs, lses)
    largest = parts * q.abs().amax(-1, keepdim=True).double()
    allowed = torch.finfo(q.dtype).eps * exact_out.abs() + 1e-5 * largest + 1e-6
    judgement.expect("merged out", (out - exact_out).abs() <= allowed)
    judgement.expect("merged lse", (lse == exact_lse) | ((lse - exact_lse).abs() <= 1e-5))


def judge_top_k(judgement: Judgement, problem: Problem, device: torch.device) -> None:
    drawn = problem.scores
    dtype = next(dtype for dtype in DTYPES if str(dtype) == drawn.dtype)
    sizes = (drawn.rows, drawn.columns)
    scores = make_scores(drawn.kind, *sizes, dtype=dtype, seed=problem.seed).to(device)
    with poisoned_memory(device):
        chosen = top_k_map(scores, drawn.count)
    judgement.expect("top_k_map", chosen == reference.top_k_map(scores, drawn.count))


def mask_tensors(problem: Problem, device: torch.device) -> dict[str, Any]:
    """The masks as attention and its oracle take them."""
    drawn, case = problem.masks, problem.case
    masks: dict[str, Any] = {"tile_n": drawn.tile_n, "causal": drawn.causal}
    if drawn.kv_tile_lens is not None:
        batch = None if drawn.kv_tile_lens == "shared" else case.batch
        masks["kv_tile_lens"] = tile_lens(case, drawn.tile_n, device, batch, problem.seed)
    if drawn.head_windows is not None:
        masks["head_windows"] = torch.tensor(drawn.head_windows, dtype=torch.int32, device=device)
    return masks


def with_noise(keep: Tensor, kv_tiles: int) -> Tensor:
    """The map with every bit set that lies past the last tile: they mean nothing."""
    if kv_tiles % WORD_BITS:
        keep = keep.clone()
        keep[..., -1] |= -1 << kv_tiles % WORD_BITS
    return keep


def judge(problem: Problem, device: torch.device) -> Judgement:
    case, judgement = problem.case, Judgement()
    if problem.operator == "top_k_map":
        judge_top_k(judgement, problem, device)
        return judgement
    dtype = next(dtype for dtype in GPU_DTYPES if str(dtype) == problem.dtype)
    q, k, v = make_qkv(case, dtype, problem.kind, problem.seed, device)
    if problem.operator == "merge_attention":
        judge_merge(judgement, problem, laid_out(problem.layout, q, k, v)[0])
        return judgement
    spoil(q, k, problem)
    q, k, v = laid_out(problem.layout, q, k, v)

    kv_lens = None if problem.kv_lens is None else torch.tensor(problem.kv_lens, dtype=torch.int32, device=device)
    tile_n = problem.masks.tile_n if problem.operator in MASKED else None
    keep = given = None
    if problem.operator != "attention":
        keep = make_map(problem.keep, case, problem.seed, device, tile_n)
        given = with_noise(keep, case.tiles(tile_n=tile_n)[1]) if problem.noisy_bits else keep
    if problem.operator in MASKED:
        masks = mask_tensors(problem, device)
        with poisoned_memory(device):
            results = attention(q, k, v, keep=given, kv_lens=kv_lens, scale=problem.scale, **masks)
        judge_values(judgement, results, problem, (q, k, v), keep, kv_lens, masks)
        return judgement

    assert keep is not None
    assert given is not None
    must_keep = None
    if problem.must_keep is not None:
        whole = unpack_keep_map(make_map("random 10%", case, problem.seed + 1, device), case.tiles()[1])
        must_keep = pack_keep_map(whole[tuple(map(slice, problem.must_keep))])
    values = problem.thresholds[0] if len(problem.thresholds) == 1 else problem.thresholds
    threshold = torch.tensor(values, dtype=torch.float32, device=device)
    with poisoned_memory(device):
        out, lse, next_keep = skip_attention(
            q, k, v, given, threshold, must_keep=must_keep, kv_lens=kv_lens, scale=problem.scale
        )
    visited = judge_decisions(judgement, next_keep, problem, q, k, keep, must_keep, kv_lens, threshold)
    judge_values(judgement, (out, lse), problem, (q, k, v), visited, kv_lens)
    return judgement


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzz the GPU's kernels against the oracle.")
    parser.add_argument("--cases", type=int, default=10_000, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which sequence of cases (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time (default: no limit)")
    parser.add_argument("--device", type=torch.device, default=GPU, help="default %(default)s")
    parser.add_argument("--output", type=Path, help="write a summary as JSON to this file")
    return parser.parse_args()


@dataclass
class Tally:
    """What the cases so far came to."""

    visited: int = 0
    unsure: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    named: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, number: int, problem: Problem, judgement: Judgement) -> None:
        self.operators[problem.operator] += 1
        self.named.update(problem.arguments())
        self.visited, self.unsure = self.visited + judgement.visited, self.unsure + judgement.unsure
        if judgement.wrong:
            self.failures.append({"number": number, "wrong": judgement.wrong, "problem": str(problem)})

    @property
    def too_unsure(self) -> bool:
        return self.unsure > max(1.0, MOST_UNSURE * self.visited)

    def facts(self) -> dict[str, Any]:
        return {
            "cases": dict(self.operators),
            "with": dict(self.named),
            "visited_tiles": self.visited,
            "tiles_too_close_to_call": self.unsure,
            "failures": self.failures,
        }


def main() -> int:
    arguments = parse_arguments()
    began, tally = time.monotonic(), Tally()

    def summary() -> dict[str, Any]:
        seconds = round(time.monotonic() - began, 1)
        return {"seed": arguments.seed, "first": arguments.first, "seconds": seconds, **tally.facts()}

    def write() -> None:
        if arguments.output is not None:  # replaced as a whole: who reads it meanwhile, or kills this, finds one
            draft = arguments.output.with_suffix(".draft")
            draft.write_text(json.dumps(summary(), indent=2) + "\n")
            draft.replace(arguments.output)

    for number in range(arguments.first, arguments.first + arguments.cases):
        problem = random_problem(arguments.seed, number)
        try:
            judgement = judge(problem, arguments.device)
        except Exception as error:  # named like any other failure; a device error makes the rest of the run fail too
            judgement = Judgement([f"{type(error).__name__}: {error}"])
        tally.add(number, problem, judgement)
        if judgement.wrong:
            print(f"FAILED {', '.join(judgement.wrong)}\n  {problem}")
            print(f"  python tests/gpu/fuzz_sm90.py --seed {arguments.seed} --first {number} --cases 1", flush=True)
        done, seconds = number + 1 - arguments.first, time.monotonic() - began
        if done % REPORT_EVERY == 0:
            print(f"{done} cases, {len(tally.failures)} failed, {done / seconds:.0f} a second", flush=True)
            write()
        if seconds > arguments.seconds:
            break
    write()
    print({**summary(), "failures": len(tally.failures)})
    if tally.too_unsure:
        few = f"expected at most {MOST_UNSURE:.0%}"
        print(f"FAILED {tally.unsure} of {tally.visited} decisions are too close to call, {few}")
    return 1 if tally.failures or tally.too_unsure else 0


if __name__ == "__main__":
    sys.exit(main())
