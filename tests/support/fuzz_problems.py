"""The problems of the fuzz (tests/gpu/fuzz_sm90.py): what a call may be, and how one is drawn."""

import math
import random
from dataclasses import dataclass

from lite_attention.maps.tiles import FINE_TILE_N, UNLIMITED
from lite_attention.ops import CausalAlignment
from support.inputs import DTYPES, GPU_DTYPES, KINDS, MAPS, Case
from support.masks import ALIGNMENTS
from support.scores import KINDS as SCORE_KINDS

OPERATORS = {"attention": 4, "attention with a map": 4, "skip_attention": 6, "merge_attention": 1, "top_k_map": 1}
MASKED = ("attention", "attention with a map")
LAYOUTS = ("BSHD", "BHSD", "fused", "wide rows", "expanded batch")
THRESHOLDS = (-math.inf, -10.0, -3.0, -1.0, -0.3, 0.0, 1.0, math.inf)
# Neighbours of the tile sizes and visit groups; others are drawn evenly.
EDGE_LENGTHS = tuple(edge + step for edge in (64, 128, 192, 256, 384, 512, 640) for step in (-1, 0, 1))
# Nothing, one key, parts of a tile, a tile, several tiles, everything.
WINDOW_SIZES = (0, 1, 4, 17, 63, 64, 100, 128, 300, UNLIMITED)
# Not v: what lies in V of keys that are hidden from a row, but not from its tile, may be NaN to it.
SPOILT = ("q", "k")
COLUMNS = (1, 31, 32, 33, 511, 513, 1025, 1537, 2049, 4097)  # of scores; the CUDA kernel's registers hold powers of two


@dataclass(frozen=True)
class Masks:
    """What hides keys inside of tiles. Only attention takes them."""

    tile_n: int | None = None
    kv_tile_lens: str | None = None
    causal: CausalAlignment | None = None
    head_windows: tuple[tuple[int, int], ...] | None = None

    def drawn(self) -> list[str]:
        """The names of those that are there."""
        return [name for name, value in vars(self).items() if value is not None]


@dataclass(frozen=True)
class Scores:
    """Rows of scores for top_k_map."""

    kind: str
    rows: int
    columns: int
    count: int
    dtype: str


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
    masks: Masks
    scores: Scores
    spoilt: str | None  # which of the inputs holds a few NaN

    def arguments(self) -> list[str]:
        """Names of the arguments, of those that not every call has, that this one has."""
        names = [name for name in ("must_keep", "kv_lens") if getattr(self, name) is not None]
        spoilt = [f"NaN in {self.spoilt}"] if self.spoilt is not None else []
        if self.operator == "skip_attention":
            return [*names, *spoilt]
        return [*({"kv_lens"} & {*names}), *self.masks.drawn(), *spoilt] if self.operator in MASKED else []


def random_length(choose: random.Random, most: int) -> int:
    return choose.choice(EDGE_LENGTHS) if choose.random() < 0.4 else choose.randint(1, most)


def random_masks(choose: random.Random, heads: int) -> Masks:
    causal = choose.choice(ALIGNMENTS) if choose.random() < 0.5 else None
    few = [tuple(choose.choice(WINDOW_SIZES) for _ in range(2)) for _ in range(3)]
    windows = tuple((sink, recent) for sink, recent in choose.choices(few, k=heads))
    return Masks(
        tile_n=FINE_TILE_N if choose.random() < 0.4 else None,
        kv_tile_lens=choose.choice(("shared", "of each batch entry")) if choose.random() < 0.3 else None,
        causal=causal,
        head_windows=windows if causal is not None and choose.random() < 0.5 else None,
    )


def random_scores(choose: random.Random) -> Scores:
    columns = choose.choice(COLUMNS) if choose.random() < 0.3 else choose.randint(1, choose.choice((200, 5000)))
    return Scores(
        kind=choose.choice(SCORE_KINDS),
        rows=choose.randint(1, 40),
        columns=columns,
        count=choose.choice((1, columns, choose.randint(1, columns), choose.randint(1, 2 * columns))),
        dtype=str(choose.choice(DTYPES)),
    )


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
        operator=choose.choices([*OPERATORS], [*OPERATORS.values()])[0],
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
        masks=random_masks(choose, case.heads),
        scores=random_scores(choose),
        spoilt=choose.choice(SPOILT) if choose.random() < 0.15 else None,
    )
