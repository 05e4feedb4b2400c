"""The tables of docs/ that come from the committed results or from the package; readme_tables.py writes them there."""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch

from attention_record import FA3, OURS, Row
from lite_attention.maps.tiles import HEAD_DIMS, tile_shape, visit_rows
from sequence_parallel_tables import efficiency_table
from sparse_families_record import goals as family_goals
from table_cells import markdown_table


class Place(NamedTuple):
    """A table of a page: what makes it, of which records."""

    make: Callable[..., str]
    records: tuple[str, ...] = ()
    runs_kernels: bool = True  # whether figures would change with them


def ring_maxima_table(record: dict[str, Any]) -> str:
    """What a running maximum of its own costs each split of a ring."""
    ranks = sorted({row["ranks"] for row in record["rows"]})
    names = ["one GPU, or Ulysses" if count == 1 else f"ring of {count}" for count in ranks]
    lines = []
    for (threshold, maximum), rows in groupby(
        sorted(record["rows"], key=lambda row: (row["threshold"], row["maximum"] != "own")),
        key=lambda row: (row["threshold"], row["maximum"]),
    ):
        of_ranks = {row["ranks"]: f"{row['kept_in_last_step']:.1%}, {row['relative_error']:.4f}" for row in rows}
        how = "own maximum" if maximum == "own" else "carried (not built)"
        lines.append([f"threshold {threshold:g}, {how}", *(of_ranks.get(count, "") for count in ranks)])
    return markdown_table(["tiles kept, error of attention in the last step", *names], lines)


class _Measured(NamedTuple):
    """A figure that has a goal; of several with one name the worst is told."""

    name: str
    at_least: bool
    bound: float
    value: float | None
    where: str = ""

    @property
    def met(self) -> bool:
        return self.value is not None and (self.value >= self.bound if self.at_least else self.value <= self.bound)

    @property
    def excess(self) -> float:
        """The larger, the worse; a figure that is missing is the worst."""
        if self.value is None:
            return float("inf")
        return self.bound - self.value if self.at_least else self.value - self.bound


def _attention_goals(record: dict[str, Any]) -> Iterator[_Measured]:
    for row in record["dense"]:
        if row["goal"] is not None:
            name = f"dense rate / {FA3}'s"
            yield _Measured(name, True, row["goal"], row["rate_over_fa3"], row["shape"]["name"])
    for row in record["skip"]:
        name = "`skip_attention`, nothing dropped / dense"
        yield _Measured(name, False, row["goal"], row["time_over_dense"], row["shape"]["name"])
    for row in record["density"]:
        for point in row["points"]:
            if point["goal"] is not None:
                where = f"{row['shape']['name']}, {row['density']:.0%}, {point['pattern']}, `{point['kernel']}`"
                name = f"time / (density * {FA3}'s dense time)"
                yield _Measured(name, False, point["goal"], point["time_over_proportional"], where)
    for row in record["host"]:
        for kernel in OURS:
            for mode, value in row["microseconds"][kernel].items():
                name = "microseconds until a call returns"
                yield _Measured(name, False, row["goal"], value, f"`{kernel}`, `{mode}`")


def _of_family(goal: Row) -> _Measured:
    at_least = "at_least" in goal
    return _Measured(goal["name"], at_least, goal["at_least" if at_least else "at_most"], goal["value"])


def kernel_goals_table(attention: dict[str, Any], families: dict[str, Any]) -> str:
    """Every goal of the Hopper kernel, the worst figure, and how many meet it."""
    measured: dict[tuple[str, bool, float], list[_Measured]] = {}
    for one in (*_attention_goals(attention), *map(_of_family, family_goals(families))):
        measured.setdefault((one.name, one.at_least, one.bound), []).append(one)
    lines = []
    for (name, at_least, bound), ones in measured.items():
        worst = max(ones, key=lambda one: one.excess)
        value = "not measured" if worst.value is None else f"{worst.value:.4g}"
        lines.append(
            [
                name,
                f"at {'least' if at_least else 'most'} {bound:g}",
                f"{value}, {worst.where}" if worst.where else value,
                f"{sum(one.met for one in ones)} of {len(ones)}",
            ]
        )
    cards = " and ".join(dict.fromkeys((attention["gpu"], families["gpu"])))
    return markdown_table([f"figure, on one {cards}", "goal", "worst", "met"], lines)


def tile_table() -> str:
    """The grain of the keep map by head dim."""
    lines = []
    for shape, dims in groupby(
        HEAD_DIMS, lambda dim: (*tile_shape(dim, torch.bfloat16), visit_rows(dim, torch.bfloat16))
    ):
        first, *_, last = dims
        lines.append([f"{first} to {last}", *map(str, shape)])
    return markdown_table(["head dim", "tile_m", "tile_n", "visit_rows"], lines)


PAGES: dict[str, dict[str, Place]] = {
    "docs/many-gpus.md": {
        "efficiency": Place(efficiency_table, ("sequence_parallel",)),
        "ring_maxima": Place(ring_maxima_table, ("ring_maxima_cpu",), runs_kernels=False),
    },
    "docs/kernel.md": {"kernel_goals": Place(kernel_goals_table, ("attention", "sparse_families"))},
    "docs/design-notes.md": {"tiles": Place(tile_table)},
}
