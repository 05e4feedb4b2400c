"""Draws the pictures of the pages in docs/: `python docs/images/maps.py` writes each SVG beside this file.

Each picture is a function here; its map comes from the library, so that a picture cannot say what the code does not do.
"""

import argparse
import ast
import itertools
import math
import textwrap
from pathlib import Path

import torch
from torch import Tensor

from lite_attention import unpack_keep_map
from lite_attention.families.sliding_tile import sliding_tile_map
from lite_attention.parallel.exchange import even_spans

ROOT = Path(__file__).parents[2]

STYLE = """
    .page { fill: #ffffff }
    .area { fill: #f3f4f6; stroke: #c3c8d0 }
    .kept { fill: #3b6fb6 }
    .text { fill: #7fb08a }
    .query { fill: #c2410c }
    .fourth { fill: #8b6fb0 }
    .step { font-size: 11px; fill: #ffffff }
    .grid { fill: none; stroke: #c3c8d0; stroke-width: 0.5 }
    text { fill: #1b1f24 }
    .name { font-weight: 600 }
    .heading { font-size: 12px; fill: #57606a }
    .file { font-size: 12px }
    @media (prefers-color-scheme: dark) {
      .page { fill: #14181d }
      .area { fill: #1d232b; stroke: #3d4653 }
      .kept { fill: #6aa3e0 }
      .text { fill: #5f9a6d }
      .query { fill: #f08a4b }
      .fourth { fill: #a78bd0 }
      .grid { stroke: #3d4653 }
      text { fill: #e8ebef }
      .heading { fill: #a2abb7 }
    }"""


def cells(kept: Tensor, css: str, x: float, y: float, size: float) -> str:
    """The cells of a bool matrix as squares with this edge, neighbours in a row drawn as one."""
    path = []
    for row, bits in enumerate(kept.tolist()):
        column = 0
        for bit, run in itertools.groupby(bits):
            width = len(list(run))
            if bit:
                path.append(f"M{column} {row}h{width}v1h-{width}z")
            column += width
    return f'<path class="{css}" transform="translate({x:g} {y:g}) scale({size:g})" d="{"".join(path)}"/>'


def grid(rows: int, columns: int, x: float, y: float, size: float) -> str:
    """Empty cells."""
    down = "".join(f"M{x + column * size:g} {y:g}v{rows * size:g}" for column in range(columns + 1))
    across = "".join(f"M{x:g} {y + row * size:g}h{columns * size:g}" for row in range(rows + 1))
    area = f'<rect class="area" x="{x:g}" y="{y:g}" width="{columns * size:g}" height="{rows * size:g}"/>'
    return f'{area}<path class="grid" d="{down}{across}"/>'


def label(text: str, x: float, y: float, css: str = "heading") -> str:
    """A line of text."""
    return f'<text class="{css}" x="{x:g}" y="{y:g}">{text}</text>'


def picture(title: str, width: int, height: int, parts: list[str]) -> str:
    """An SVG file in light and dark."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
        f'font-size="13" role="img" aria-label="{title}">'
    )
    page = f'<rect class="page" width="{width}" height="{height}" rx="10"/>'
    return "\n".join([head, f"  <style>{STYLE}\n  </style>", *(f"  {part}" for part in (page, *parts)), "</svg>\n"])


def draw_sliding_tile() -> str:
    """Windows around two tiles of a video, and the whole map, text included."""
    counts, window, text_tiles = (4, 4, 6), (3, 3, 3), 3
    frames, rows, columns = counts
    tiles = math.prod(counts)
    sliding = sliding_tile_map(
        window,
        (4 * frames, 4 * rows, 4 * columns),
        tile=(4, 4, 4),  # of 64 tokens: one row and one column of the map each
        text_tokens=64 * text_tiles,
        head_dim=64,
        dtype=torch.float32,
    )
    keep = unpack_keep_map(sliding.keep, tiles + text_tiles)[0, 0]
    is_text = torch.arange(tiles + text_tiles) >= tiles
    text_part = keep & (is_text | is_text.unsqueeze(-1))

    size, parts = 11.0, []
    step = columns * size + 12
    for picture_row, (words, query) in enumerate(
        (
            ("A tile and the window (3, 3, 3) around it", (1, 2, 2)),
            ("At the border the window is moved inward", (3, 0, 5)),
        )
    ):
        top = 62 + picture_row * 130
        chosen = (query[0] * rows + query[1]) * columns + query[2]
        seen = keep[chosen, :tiles].view(counts)
        parts.append(label(words, 24, top - 24, "name"))
        for frame in range(frames):
            left = 24 + frame * step
            parts.append(label(f"t = {frame}", left, top - 6))
            parts += [grid(rows, columns, left, top, size), cells(seen[frame], "kept", left, top, size)]
            if frame == query[0]:
                here = torch.zeros(rows, columns, dtype=torch.bool)
                here[query[1:]] = True
                parts.append(cells(here, "query", left, top, size))
    for line, (css, words) in enumerate((("query", "tile of the query"), ("kept", "attended"), ("text", "text"))):
        y = 290 + 18 * line
        parts += [f'<rect class="{css}" x="24" y="{y - 9}" width="{size:g}" height="{size:g}"/>', label(words, 42, y)]

    edge, left, top = 3.0, 380, 62
    total = tiles + text_tiles
    parts.append(label("The map: query tiles down, KV tiles across", left, 38, "name"))
    parts.append(grid(1, 1, left, top, total * edge))
    parts.append(cells(keep & ~text_part, "kept", left, top, edge))
    parts.append(cells(text_part, "text", left, top, edge))
    return picture("Sliding tiles: windows in the video, and the keep map that they make", 710, 384, parts)


def draw_many_gpus() -> str:
    """Who computes which scores on four ranks, and when keys arrive in a ring."""
    heads, ranks, size = 4, 4, 18.0
    colours = ("kept", "text", "query", "fourth")
    parts = [label("Scores of four heads: shards of queries down, shards of keys across", 24, 30, "name")]
    for row, (name, words, ring) in enumerate(
        (
            ("Ulysses", "a head each, all tokens", 1),
            ("ring", "queries stay, keys come round", 4),
            ("both", "2 in a ring, 2 for Ulysses", 2),
        )
    ):
        top, ulysses = 62 + row * 98, ranks // ring
        parts += [label(name, 24, top + 30, "name"), label(words, 24, top + 48)]
        block = ranks // ring
        spans = even_spans(heads, ulysses)
        for head in range(heads):
            left = 220 + head * (ranks * size + 14)
            place = next(index for index, (start, end) in enumerate(spans) if start <= head < end)
            if row == 0:
                parts.append(label(f"head {head}", left, top - 8))
            parts.append(grid(ranks, ranks, left, top, size))
            for of_ring in range(ring):
                mine = torch.zeros(ranks, ranks, dtype=torch.bool)
                mine[of_ring * block : (of_ring + 1) * block] = True
                parts.append(cells(mine, colours[of_ring * ulysses + place], left, top, size))
                for step in range(ring if ring > 1 else 0):
                    split = (of_ring - step) % ring
                    x, y = left + (split + 0.5) * block * size - 4, top + (of_ring + 0.5) * block * size + 5
                    parts.append(label(str(step), x, y, "step"))
    for rank, css in enumerate(colours):
        x = 24 + 90 * rank
        parts += [f'<rect class="{css}" x="{x}" y="352" width="11" height="11"/>', label(f"rank {rank}", x + 18, 361)]
    parts.append(label("numbers: step in which the keys arrive", 24 + 90 * ranks - 8, 361))
    return picture("Who computes what on four ranks, by Ulysses, in a ring, and by both", 640, 384, parts)


# Floors of the house, from the roof down: a room may import from the rooms below it, and not from those beside it.
FLOORS = (
    ("integrations",),
    ("layers", "compat"),
    ("parallel",),
    ("skipping", "families", "triton"),
    ("maps",),
    ("ops",),
)
BESIDE = "reference"  # imports maps alone, and is imported by tests


def draw_house() -> str:
    """The rooms of the package on their floors, each with its purpose and its files; below them what is compiled."""
    package = ROOT / "python" / "lite_attention"
    width, line = 980, 16

    def lines(folder: Path, columns: int) -> list[str]:
        names = sorted({path.stem + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("_")})
        return textwrap.wrap(" · ".join(names), columns)

    def room(name: str, folder: Path, purpose: str, x: float, y: float, across: float, height: float) -> list[str]:
        inside = [label(name, x + 12, y + 21, "name"), label(purpose, x + 12, y + 39)]
        files = lines(folder, int(across / 6.4))
        inside += [label(text, x + 12, y + 60 + line * row, "file") for row, text in enumerate(files)]
        return [f'<rect class="area" x="{x:g}" y="{y:g}" width="{across:g}" height="{height:g}" rx="6"/>', *inside]

    parts, y = [label("Imports go down: what lies on a floor knows the floors below it alone", 24, 30, "name")], 46.0
    beside = 200.0
    for floor in FLOORS:
        there = [name for name in floor if (package / name).is_dir()]
        across = (width - 48 - beside - 12 - 12 * (len(there) - 1)) / len(there)
        height = 52 + line * max(len(lines(package / name, int(across / 6.4))) for name in there) + 4
        for place, name in enumerate(there):
            purpose = ast.get_docstring(ast.parse((package / name / "__init__.py").read_text())) or ""
            first = textwrap.shorten(purpose.partition("\n")[0], int(across / 6.9), placeholder=" …").replace("`", "")
            parts += room(name, package / name, first, 24 + place * (across + 12), y, across, height)
        y += height + 10
    x, top = width - 24 - beside, 46.0
    parts.append(f'<rect class="area" x="{x:g}" y="{top:g}" width="{beside:g}" height="{y - 10 - top:g}" rx="6"/>')
    parts += [label(BESIDE, x + 12, top + 21, "name"), label("the oracle, in plain torch", x + 12, top + 42)]
    parts += [label(f"{text}", x + 12, top + 66 + line * row) for row, text in enumerate(lines(package / BESIDE, 26))]
    for name, purpose in CPP.items():
        height = 52 + line * len(lines(ROOT / "cpp" / name, int((width - 48) / 6.4))) + 4
        parts += room(f"cpp/{name}", ROOT / "cpp" / name, purpose, 24, y, width - 48, height)
        y += height + 10
    return picture(
        "The rooms of the package and of what is compiled, in the order of their imports", width, int(y + 14), parts
    )


CPP = {
    "operators": "arguments to params, and whose kernel runs; the one place that knows torch",
    "params": "plain structs: what a kernel is told",
    "rules": "every rule once, for host and device",
    "kernels": "CPU and sm90; they know params and rules alone",
}
PICTURES = {"house.svg": draw_house, "many-gpus.svg": draw_many_gpus, "sliding-tile.svg": draw_sliding_tile}


def main() -> None:
    """Write the pictures."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, draw in PICTURES.items():
        Path(__file__).with_name(name).write_text(draw())


if __name__ == "__main__":
    main()
