"""Random small problems through the GPU's kernels, in one process; each is judged against the oracle.

    python tests/gpu/fuzz_sm90.py --cases 10000 --output fuzz.json
    python tests/gpu/fuzz_sm90.py --seed 0 --first 4711 --cases 1

The second line runs one case again: a case follows from the seed and its number alone, and a failure prints that line.
Values are judged element by element, by what rounding the weights and the output to the inputs' dtype can cost.
Decisions equal the oracle's, except where a margin is within rounding of the threshold; such tiles are counted.
Exit status 1 if any case fails.
"""

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lite_attention import attention, merge_attention, pack_keep_map, reference, skip_attention, unpack_keep_map
from lite_attention.maps.keep_map import WORD_BITS
from support.inputs import GPU, GPU_DTYPES, KINDS, MAPS, Case, make_map, make_qkv, poisoned_memory, score_rounding

OPERATORS = ("attention", "attention with a map", "skip_attention", "merge_attention")
LAYOUTS = ("BSHD", "BHSD", "fused", "wide rows", "expanded batch")
THRESHOLDS = (-math.inf, -10.0, -3.0, -1.0, -0.3, 0.0, 1.0, math.inf)
# Neighbours of the tile sizes and visit groups; others are drawn evenly.
EDGE_LENGTHS = tuple(edge + step for edge in (64, 128, 192, 256, 384, 512, 640) for step in (-1, 0, 1))
MOST_UNSURE = 0.01  # of all visited tiles
REPORT_EVERY = 500


@dataclass(frozen=True)
class Problem:
    """One call. Everything random in its tensors follows from ``seed``."""

    seed: int
    operator: str
    case: Case
    dtype: str
    kind: str
    layout: str
    scale: float
    keep: str
    noisy_bits: bool
    must_keep: tuple[int, int, int] | None
    kv_lens: tuple[int, ...] | None
    thresholds: tuple[float, ...]


def random_length(choose: random.Random, most: int) -> int:
    return choose.choice(EDGE_LENGTHS) if choose.random() < 0.4 else choose.randint(1, most)


def random_problem(seed: int, number: int) -> Problem:
    choose = random.Random(f"{seed}/{number}")
    kv_heads, group = choose.choice(((1, 1), (1, 1), (2, 1), (1, 3), (2, 2), (3, 2), (1, 8)))
    query_len, kv_len = random_length(choose, 700), random_length(choose, 900)
    if choose.random() < 0.1:  # maps of several words
        query_len, kv_len = choose.randint(1, 200), choose.randint(4000, 9000)
    case = Case(
        batch=choose.choice((1, 1, 2, 3)),
        query_len=query_len,
        kv_len=kv_len,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=choose.choice((64, 128, 256)) if choose.random() < 0.5 else 8 * choose.randint(1, 32),
    )
    query_tiles = case.tiles()[0]
    sizes = [choose.choice((1, size)) for size in (case.batch, case.heads, query_tiles)]
    lens = [
        choose.choice((0, 1, kv_len, choose.randint(0, kv_len), choose.randint(0, kv_len))) for _ in range(case.batch)
    ]
    return Problem(
        seed=choose.getrandbits(32),
        operator=choose.choices(OPERATORS, (2, 2, 6, 1))[0],
        case=case,
        dtype=str(choose.choice(GPU_DTYPES)),
        kind=choose.choice(KINDS),
        layout=choose.choice(LAYOUTS),
        scale=case.scale * choose.choice((1.0, 1.0, 0.1, 3.0)),
        keep=choose.choice(MAPS),
        noisy_bits=choose.random() < 0.2,
        must_keep=(sizes[0], sizes[1], sizes[2]) if choose.random() < 0.3 else None,
        kv_lens=tuple(lens) if choose.random() < 0.3 else None,
        thresholds=tuple(choose.choice(THRESHOLDS) for _ in range(choose.choice((1, case.heads)))),
    )


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


def judge_values(
    judgement: Judgement,
    results: tuple[Tensor, Tensor],
    problem: Problem,
    qkv: tuple[Tensor, Tensor, Tensor],
    keep: Tensor | None,
    kv_lens: Tensor | None,
) -> None:
    out, lse = results
    q, k, v = qkv
    exact_out, exact_lse = reference.attention(q, k, v, keep, kv_lens, problem.scale)
    weighted, _ = reference.attention(q, k, v.abs(), keep, kv_lens, problem.scale)  # sum of weight * |value|
    eps = torch.finfo(out.dtype).eps
    score_error = score_rounding(q, k, problem.scale)
    # Half an eps for each weight, half for the output, and the scores' own error above and below the fraction line.
    allowed = (1.05 * eps + 2 * score_error) * weighted + 1e-6
    if out.dtype == torch.float16:  # weights under its normal range are rounded to multiples of 2**-24
        allowed += problem.case.kv_len * 2.0**-25 * v.abs().max()
    judgement.expect("out", (out - exact_out).abs() <= allowed)
    empty = exact_lse == -math.inf
    judgement.expect("out of empty rows", (out == 0) | ~empty.transpose(1, 2).unsqueeze(-1))
    judgement.expect("lse of empty rows", (lse == -math.inf) == empty)
    error = (lse - exact_lse).masked_fill(empty, 0.0).abs()
    judgement.expect("lse", error <= 2e-5 + score_error + 4 * torch.finfo(torch.float32).eps * exact_lse.abs())


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
    visited = margins > -math.inf
    distance = (margins - threshold.double().reshape(-1, 1, 1)).abs()
    unsure = visited & (distance <= score_rounding(q, k, problem.scale))
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


def judge(problem: Problem, device: torch.device) -> Judgement:
    case, judgement = problem.case, Judgement()
    dtype = next(dtype for dtype in GPU_DTYPES if str(dtype) == problem.dtype)
    q, k, v = laid_out(problem.layout, *make_qkv(case, dtype, problem.kind, problem.seed, device))
    kv_lens = None if problem.kv_lens is None else torch.tensor(problem.kv_lens, dtype=torch.int32, device=device)
    if problem.operator == "merge_attention":
        judge_merge(judgement, problem, q)
        return judgement
    if problem.operator == "attention":
        with poisoned_memory(device):
            results = attention(q, k, v, kv_lens=kv_lens, scale=problem.scale)
        judge_values(judgement, results, problem, (q, k, v), None, kv_lens)
        return judgement

    keep = make_map(problem.keep, case, problem.seed, device)
    given = keep
    if problem.noisy_bits and case.tiles()[1] % WORD_BITS:
        given = keep.clone()
        given[..., -1] |= -1 << case.tiles()[1] % WORD_BITS  # bits past the last tile mean nothing
    if problem.operator == "attention with a map":
        with poisoned_memory(device):
            results = attention(q, k, v, keep=given, kv_lens=kv_lens, scale=problem.scale)
        judge_values(judgement, results, problem, (q, k, v), keep, kv_lens)
        return judgement

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


def main() -> int:
    arguments = parse_arguments()
    began = time.monotonic()
    failures, operators = [], Counter[str]()
    visited = unsure = 0
    for number in range(arguments.first, arguments.first + arguments.cases):
        problem = random_problem(arguments.seed, number)
        try:
            judgement = judge(problem, arguments.device)
        except Exception as error:  # named like any other failure; a device error makes the rest of the run fail too
            judgement = Judgement([f"{type(error).__name__}: {error}"])
        operators[problem.operator] += 1
        visited, unsure = visited + judgement.visited, unsure + judgement.unsure
        if judgement.wrong:
            failures.append({"number": number, "wrong": judgement.wrong, "problem": str(problem)})
            print(f"FAILED {', '.join(judgement.wrong)}\n  {problem}")
            print(f"  python tests/gpu/fuzz_sm90.py --seed {arguments.seed} --first {number} --cases 1", flush=True)
        done, seconds = sum(operators.values()), time.monotonic() - began
        if done % REPORT_EVERY == 0:
            print(f"{done} cases, {len(failures)} failed, {done / seconds:.0f} a second", flush=True)
        if seconds > arguments.seconds:
            break
    too_unsure = unsure > max(1.0, MOST_UNSURE * visited)
    summary = {
        "seed": arguments.seed,
        "first": arguments.first,
        "cases": dict(operators),
        "seconds": round(time.monotonic() - began, 1),
        "visited_tiles": visited,
        "tiles_too_close_to_call": unsure,
        "failures": failures,
    }
    print({**summary, "failures": len(failures)})
    if too_unsure:
        print(f"FAILED {unsure} of {visited} decisions are too close to call, expected at most {MOST_UNSURE:.0%}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(summary, indent=2) + "\n")
    return 1 if failures or too_unsure else 0


if __name__ == "__main__":
    sys.exit(main())
