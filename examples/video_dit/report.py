"""The demo's results as a table, one self-contained HTML page and an overview picture.

Over 400 lines: all three tell the same results, and share how these are worded and drawn.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

Size = tuple[int, int, int]

OPTIONS = ("steps", "dense_first", "guidance", "shift", "seeds", "clips", "thresholds")
CLIPS_SHOWN = 4  # the page carries its videos inside it
SCALE = 4  # screen pixels for one video pixel
FRAME_MS = 110
CUBE = 4  # tokens per side of the cube that one query tile covers
COLOURS = ("#c2410c", "#0f766e", "#4338ca", "#a16207", "#be185d", "#15803d")
INK, MUTED, GRID = "#1c1917", "#78716c", "#e7e5e4"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "path",
    "figure.dpi": 100,
}


@dataclass(kw_only=True)
class Run:
    """One setting: its clips, what it skipped and how long it took.

    video is fp32 `[clips, 3, frames, height, width]` in [0, 1]; kept the share of tiles computed in each pass
    `[steps, layers, heads]`, averaged over clips and guidance branches; attention_seconds `[steps, layers]`, summed
    over clips; last_maps each layer's keep map in the last step of the first clip, bool
    `[heads, query_tiles, kv_tiles]` of the conditional branch; clip_psnr each clip's PSNR against the dense one. Both
    are empty for the dense run. Of the settings one is given: LiteAttention's threshold, the window of sliding tiles or
    how many blocks top-k takes; for the dense run none.
    """

    video: Tensor
    kept: Tensor
    attention_seconds: Tensor
    total_seconds: float
    last_maps: list[Tensor] = field(default_factory=list)
    clip_psnr: list[float] = field(default_factory=list)
    relative_l2: float | None = None
    threshold: float | None = None
    window: Size | None = None
    top_blocks: int | None = None

    @property
    def family(self) -> str:
        if self.window is not None:
            return "sliding tiles"
        if self.top_blocks is not None:
            return "top-k blocks"
        return "dense" if self.threshold is None else "LiteAttention"

    @property
    def dense(self) -> bool:
        return self.family == "dense"

    @property
    def psnr(self) -> float | None:
        return sum(self.clip_psnr) / len(self.clip_psnr) if self.clip_psnr else None

    @property
    def name(self) -> str:
        if self.window is not None:
            return "window " + "x".join(map(str, self.window))
        if self.top_blocks is not None:
            return f"top {self.top_blocks} blocks"
        return "dense" if self.threshold is None else f"threshold {self.threshold:g}"

    @property
    def kept_share(self) -> float:
        return self.kept.mean().item()

    @property
    def attention_total(self) -> float:
        return self.attention_seconds.sum().item()


@dataclass
class Comparison:
    """The families over a denoising of their own; runs[0] is the dense one."""

    runs: list[Run]
    steps: int
    dense_first: int

    def families(self) -> dict[str, list[Run]]:
        """The runs of each family but the dense one."""
        found: dict[str, list[Run]] = {}
        for run in self.runs[1:]:
            found.setdefault(run.family, []).append(run)
        return found


@dataclass
class Result:
    """Everything the report shows; runs[0] is the dense one."""

    runs: list[Run]
    options: dict[str, Any]
    made_with: dict[str, Any]  # as the top of the record
    grid: tuple[int, int, int]
    curve: dict[str, Any] | None
    seconds: float
    comparison: Comparison | None = None


class Progress:
    """A progress bar over the denoising steps of all runs."""

    def __init__(self, steps: int) -> None:
        self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True, mininterval=0.5)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def done(self, name: str) -> None:
        """One step of the named run is done."""
        self.bar.set_description(f"{name:>15}", refresh=False)
        self.bar.update()


def duration(seconds: float) -> str:
    """Seconds for a person."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def rows(result: Result) -> list[list[str]]:
    """The table's cells, header first."""
    dense = result.runs[0]
    lines = [
        ["threshold", "tiles kept", "attention", "speed-up", "all of it", "speed-up", "PSNR", "relative L2"],
    ]
    for run in result.runs:
        lines.append(
            [
                "dense" if run.threshold is None else f"{run.threshold:g}",
                f"{run.kept_share:.1%}",
                duration(run.attention_total),
                f"{dense.attention_total / run.attention_total:.2f}x",
                duration(run.total_seconds),
                f"{dense.total_seconds / run.total_seconds:.2f}x",
                "" if run.psnr is None else "equal" if run.psnr >= 98.9 else f"{run.psnr:.1f} dB",
                "" if run.relative_l2 is None else f"{run.relative_l2:.4f}",
            ]
        )
    return lines


def comparison_rows(comparison: Comparison) -> list[list[str]]:
    """The cells of the comparison's table, header first."""
    dense = comparison.runs[0]
    lines = [["family", "setting", "tiles computed", "a step", "speed-up", "attention", "speed-up", "PSNR"]]
    for run in comparison.runs:
        lines.append(
            [
                run.family,
                "" if run.dense else run.name,
                f"{run.kept_share:.1%}",
                duration(run.total_seconds / comparison.steps),
                f"{dense.total_seconds / run.total_seconds:.2f}x",
                duration(run.attention_total / comparison.steps),
                f"{dense.attention_total / run.attention_total:.2f}x",
                "" if run.psnr is None else "equal" if run.psnr >= 98.9 else f"{run.psnr:.1f} dB",
            ]
        )
    return lines


def comparison_sentence(comparison: Comparison) -> str:
    """In words: what the families had in common."""
    return (
        f"The families compared over {comparison.steps} steps, the first {comparison.dense_first} of them dense; "
        "tiles, times and PSNR are those of this short denoising."
    )


def comparison_table(comparison: Comparison) -> str:
    """The comparison as aligned text."""
    return _aligned(comparison_rows(comparison))


def table(result: Result) -> str:
    """The results as aligned text."""
    return _aligned(rows(result))


def _aligned(cells: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def proportion(run: Run, dense: Run) -> tuple[float, float]:
    """Kept share and attention time against dense, both over the passes in which the run's map left something out."""
    skipping = run.kept.mean(dim=2) < 1
    if not bool(skipping.any()):
        return 1.0, run.attention_total / dense.attention_total
    time_share = run.attention_seconds[skipping].sum() / dense.attention_seconds[skipping].sum()
    return run.kept.mean(dim=2)[skipping].mean().item(), time_share.item()


def proportion_sentence(result: Result) -> str:
    """In words: how far attention time follows the share of tiles that is computed."""
    parts = []
    for run in result.runs[1:]:
        kept, spent = proportion(run, result.runs[0])
        parts.append(f"{kept:.1%} of the tiles took {spent:.1%} of the dense time ({run.name})")
    return "In the passes that skipped, " + "; ".join(parts) + "."


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pixels(video: Tensor) -> npt.NDArray[np.uint8]:
    """`[3, T, H, W]` in [0, 1] -> uint8 `[T, H, W, 3]`."""
    return (video.clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).numpy()


def animation(video: Tensor) -> str:
    """A clip `[3, T, H, W]` in [0, 1] as a looping WebP data URL."""
    frames = [Image.fromarray(frame) for frame in _pixels(video)]
    big = [frame.resize((frame.width * SCALE, frame.height * SCALE), Image.Resampling.BICUBIC) for frame in frames]
    buffer = io.BytesIO()
    big[0].save(buffer, "WEBP", save_all=True, append_images=big[1:], duration=FRAME_MS, loop=0, quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(figure: Figure) -> str:
    """A figure as inline SVG; the XML prologue does not belong inside HTML."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw_heatmap(axes: Axes, run: Run) -> Any:
    image = axes.imshow(run.kept.mean(dim=2).T.numpy(), vmin=0, vmax=1, cmap="magma", aspect="auto", origin="lower")
    axes.set_title(f"{run.name}, {run.kept_share:.0%} kept", fontsize=10, loc="left")
    axes.set_xlabel("step")
    axes.set_yticks(range(run.kept.shape[1]))
    axes.grid(visible=False)
    return image


def kept_figure(result: Result) -> str:
    """Kept share by step and layer, one heat map for each threshold."""
    runs = result.runs[1:]
    figure, axes = plt.subplots(1, len(runs), figsize=(3.2 * len(runs) + 0.6, 2.9), squeeze=False, layout="constrained")
    for ax, run in zip(axes[0], runs, strict=True):
        image = _draw_heatmap(ax, run)
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes[0]), label="share of tiles computed", shrink=0.95)
    return _svg(figure)


def _draw_quality(axes: Axes, result: Result) -> None:
    if result.curve:
        for curve, style in zip(result.curve["curves"], (":", "--", "-"), strict=False):
            points = sorted(curve["points"], key=lambda point: point["skipped"])
            label = f"GPU study, {curve['dense_first']} dense first steps"
            axes.plot(
                [100 * point["skipped"] for point in points],
                [point["psnr_mean"] for point in points],
                style,
                color=MUTED,
                marker=".",
                linewidth=1.2,
                label=label,
            )
    for run, colour in zip(result.runs[1:], COLOURS * 9, strict=False):
        if run.psnr is not None:
            skipped = 100 * (1 - run.kept_share)
            axes.plot(skipped, min(run.psnr, 60), "o", color=colour, markersize=9, label=f"this run, {run.name}")
    axes.axhline(35, color=MUTED, linewidth=0.8)
    axes.annotate("35 dB", (1.0, 35), (2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", fontsize=8, color=MUTED)  # fmt: skip
    axes.set_xlabel("tiles skipped over the whole run (%)")
    axes.set_ylabel("PSNR against dense (dB)")


def quality_figure(result: Result) -> str:
    """Skipped share against PSNR: this run and the committed study."""
    figure, axes = plt.subplots(figsize=(5.6, 3.9), layout="constrained")
    _draw_quality(axes, result)
    axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _draw_time(axes: Axes, result: Result) -> None:
    dense = result.runs[0]
    reference = dense.attention_seconds.median(dim=0).values  # one layer's dense pass, the median over the steps
    for run, colour in zip(result.runs[1:], COLOURS * 9, strict=False):
        kept = run.kept.mean(dim=2)
        spent = run.attention_seconds / reference
        axes.plot(kept.flatten(), spent.flatten(), ".", color=colour, alpha=0.45, markersize=5, label=run.name)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, label="in proportion")
    axes.set_xlim(0, 1.05)
    axes.set_ylim(0, 1.5)
    axes.set_xlabel("share of tiles computed in the pass")
    axes.set_ylabel("its time, dense = 1")


def time_figure(result: Result) -> str:
    """Time of every attention pass against the share of tiles it computed."""
    figure, axes = plt.subplots(figsize=(5.6, 3.9), layout="constrained")
    _draw_time(axes, result)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return _svg(figure)


def _picked_heads(maps: list[Tensor]) -> list[tuple[int, int]]:
    """(layer, head) of a sparse, a middling and a dense map."""
    shares = sorted((maps[layer][head].float().mean().item(), layer, head)
                    for layer in range(len(maps)) for head in range(maps[layer].shape[0]))  # fmt: skip
    chosen = [shares[len(shares) // 10], shares[len(shares) // 2], shares[-1 - len(shares) // 10]]
    return [(layer, head) for _, layer, head in chosen]


def map_figure(run: Run) -> str:
    """Keep maps of three heads in the last step, query tiles down and KV tiles to the right."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 4.6), layout="constrained")
    for ax, (layer, head) in zip(axes, _picked_heads(run.last_maps), strict=True):
        keep = run.last_maps[layer][head]
        ax.imshow(keep.numpy(), cmap="Greys", vmin=0, vmax=1.25, aspect=0.5, interpolation="nearest")
        ax.set_title(f"layer {layer}, head {head}: {keep.float().mean():.0%} kept", fontsize=10, loc="left")
        ax.set_xlabel("KV tile (128 keys)")
        ax.grid(visible=False)
    axes[0].set_ylabel("query tile (64 rows)")
    return _svg(figure)


def cube_of_tokens(grid: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    """For every token position (t, y, x) the index of its cube, which is its query tile."""
    t, h, w = (np.arange(side) // CUBE for side in grid)
    across, along = grid[2] // CUBE, grid[1] // CUBE
    return t[:, None, None] * (along * across) + h[None, :, None] * across + w[None, None, :]


def reach_figure(run: Run, grid: tuple[int, int, int]) -> str:
    """What one query tile still looks at: frames of the clip, pale where the head skips it."""
    cubes = cube_of_tokens(grid)
    kv_per_cube = 128 // CUBE**3
    video = _pixels(run.video[0])
    t_cube, y_cube, x_cube = (side // CUBE // 2 for side in grid)
    query = cubes[t_cube * CUBE, y_cube * CUBE, x_cube * CUBE]
    patch = video.shape[1] // grid[1]
    shown = [cube * CUBE + CUBE // 2 for cube in range(grid[0] // CUBE)]
    heads = _picked_heads(run.last_maps)
    size = (1.75 * len(shown), 1.9 * len(heads))
    figure, axes = plt.subplots(len(heads), len(shown), figsize=size, squeeze=False, layout="constrained")
    for line, (row, (layer, head)) in enumerate(zip(axes, heads, strict=True)):
        kept = run.last_maps[layer][head][query].numpy()[cubes // kv_per_cube]
        for ax, frame in zip(row, shown, strict=True):
            seen = np.kron(kept[frame], np.ones((patch, patch)))[:, :, None]
            picture = video[frame] / 255.0
            ax.imshow(picture * seen + (0.12 * picture + 0.8) * (1 - seen))
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(visible=False)
            if frame // CUBE == t_cube:
                corner = (x_cube * CUBE * patch - 0.5, y_cube * CUBE * patch - 0.5)
                ax.add_patch(Rectangle(corner, CUBE * patch, CUBE * patch, fill=False, color="#f97316", linewidth=2))
            if line == 0:
                ax.set_title(f"frames {frame - CUBE // 2}-{frame + CUBE // 2 - 1}", fontsize=9, color=MUTED)
        row[0].set_ylabel(f"layer {layer}, head {head}", fontsize=9)
    return _svg(figure)


def write_picture(result: Result, path: Path) -> None:
    """An overview PNG: frames of every run, and skipped share against PSNR."""
    frames = np.linspace(0, result.runs[0].video.shape[2] - 1, 6).round().astype(int)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12.4, max(2.6, 0.98 * len(result.runs) + 0.1)), layout="constrained")
        parts: Any = figure.subfigures(1, 3, width_ratios=(7.2, 4.6, 4.6))
        left, middle, right = parts
        grid = left.subplots(len(result.runs), len(frames), squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
        for line, run in zip(grid, result.runs, strict=True):
            for ax, frame in zip(line, frames, strict=True):
                ax.imshow(_pixels(run.video[0])[frame])
                ax.set_xticks([])
                ax.set_yticks([])
            text = "dense" if run.threshold is None else f"{run.threshold:g}\n{1 - run.kept_share:.0%} skipped"
            line[0].set_ylabel(text, fontsize=9)
        axes = middle.subplots()
        _draw_quality(axes, result)
        axes.legend(fontsize=6.5, frameon=False)
        axes = right.subplots()
        _draw_time(axes, result)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_comparison(axes: Axes, comparison: Comparison) -> None:
    dense_seconds = comparison.runs[0].total_seconds / comparison.steps
    unit, per_second = ("s", 1) if dense_seconds >= 1 else ("ms", 1000)
    dense = per_second * dense_seconds
    for (family, runs), colour in zip(comparison.families().items(), COLOURS, strict=False):
        ordered = sorted(runs, key=lambda run: run.kept_share)
        times = [per_second * run.total_seconds / comparison.steps for run in ordered]
        quality = [min(run.psnr or 0.0, 60.0) for run in ordered]
        axes.plot(times, quality, "o-", color=colour, markersize=6, linewidth=1.4, label=family)
        for run, x, y in zip(ordered, times, quality, strict=True):
            axes.annotate(f"{run.kept_share:.0%}", (x, y), (5, -11), textcoords="offset points", fontsize=8,
                          color=colour)  # fmt: skip
    axes.axvline(dense, color=MUTED, linewidth=0.8)
    axes.annotate("dense", (dense, 1.0), (-4, -10), xycoords=("data", "axes fraction"), textcoords="offset points",
                  ha="right", fontsize=8, color=MUTED)  # fmt: skip
    axes.set_xlabel(f"time of a whole step ({unit}), mean over the run")
    axes.set_ylabel("PSNR against dense (dB)")
    axes.legend(fontsize=8, frameon=False)


def comparison_figure(comparison: Comparison) -> Figure:
    """Quality against time, one line a family; at each point the share of tiles computed."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    _draw_comparison(axes, comparison)
    return figure


def write_comparison_picture(comparison: Comparison, path: Path) -> None:
    """The comparison's plot as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure = comparison_figure(comparison)
        figure.savefig(path, dpi=130)
        plt.close(figure)


# --- the page ---------------------------------------------------------------------------------------------------------

CSS = """
:root{--ink:#1c1917;--muted:#78716c;--line:#e7e5e4;--paper:#fafaf9;--accent:#c2410c}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:32px;line-height:1.2;margin:0 0 8px;letter-spacing:-.02em}
h2{font-size:20px;margin:44px 0 6px}
p{max-width:74ch;margin:6px 0 14px}.lead{font-size:18px}.small,figcaption{color:var(--muted);font-size:14px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin:22px 0}
.card{background:#fff;border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.card b{display:block;font-size:26px;line-height:1.2}.card span{color:var(--muted);font-size:14px}
.videos{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px;margin:14px 0}
figure{margin:0}.videos img{width:100%;border-radius:10px;display:block;background:#ddd}
.videos figcaption{padding-top:6px}.videos strong{color:var(--ink)}
.panel{background:#fff;border:1px solid var(--line);border-radius:12px;padding:16px;margin:12px 0;overflow-x:auto}
.panel svg{max-width:100%;height:auto;display:block;margin:auto}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:14px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:8px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--muted);font-size:14px}tr:last-child td{border-bottom:0}
th:first-child,td:first-child{text-align:left}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}code{background:#f5f5f4;padding:1px 5px;border-radius:4px}
"""


def _table_html(cells: list[list[str]]) -> str:
    header, *body = cells
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _videos_html(result: Result) -> str:
    blocks = []
    dense = result.runs[0]
    for clip, seed in enumerate(result.options["seeds"][:CLIPS_SHOWN]):
        figures = []
        for run in result.runs:
            caption = f"<strong>{run.name}</strong>"
            if run.threshold is not None:
                caption += f"<br>{1 - run.kept_share:.0%} skipped, {run.clip_psnr[clip]:.1f} dB"
            else:
                caption += "<br>every tile computed"
            picture = f'<img alt="{run.name}, seed {seed}" src="{animation(run.video[clip])}">'
            figures.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
        worst = max(result.runs[1:], key=lambda run: 1 - run.kept_share)
        difference = ((worst.video[clip] - dense.video[clip]).abs() * 8).clamp(0, 1)
        picture = f'<img alt="difference, seed {seed}" src="{animation(difference)}">'
        caption = f"<strong>difference x 8</strong><br>{worst.name} against dense"
        figures.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
        blocks.append(f'<div class="videos">{"".join(figures)}</div>')
    if len(dense.video) > CLIPS_SHOWN:
        blocks.append(f'<p class="small">The first {CLIPS_SHOWN} of {len(dense.video)} clips.</p>')
    return "".join(blocks)


def facts(result: Result) -> dict[str, Any]:
    """The figures behind the page, as plain numbers."""
    runs = []
    for run in result.runs:
        kept, spent = proportion(run, result.runs[0])
        runs.append(
            {
                "threshold": run.threshold,
                "kept": round(run.kept_share, 5),
                "attention_seconds": round(run.attention_total, 6),
                "total_seconds": round(run.total_seconds, 6),
                "psnr": run.psnr,
                "psnr_worst": min(run.clip_psnr, default=None),
                "relative_l2": run.relative_l2,
                "kept_in_skipping_passes": round(kept, 5),
                "time_share_in_skipping_passes": round(spent, 5),
                "kept_by_step_and_layer": [[round(x, 4) for x in step] for step in run.kept.mean(dim=2).tolist()],
            }
        )
    found = {**result.made_with, "options": result.options, "seconds": result.seconds, "runs": runs}
    return found if result.comparison is None else {**found, "comparison": comparison_facts(result.comparison)}


def comparison_facts(comparison: Comparison) -> dict[str, Any]:
    """The figures of the comparison, as plain numbers."""
    runs = [
        {
            "family": run.family,
            "setting": run.name,
            "kept": round(run.kept_share, 5),
            "step_seconds": round(run.total_seconds / comparison.steps, 6),
            "attention_seconds_per_step": round(run.attention_total / comparison.steps, 6),
            "psnr": run.psnr,
            "psnr_worst": min(run.clip_psnr, default=None),
            "relative_l2": run.relative_l2,
        }
        for run in comparison.runs
    ]
    return {"steps": comparison.steps, "dense_first": comparison.dense_first, "runs": runs}


def _comparison_html(comparison: Comparison) -> str:
    return f"""
<h2>Three ways to choose the tiles</h2>
<p>LiteAttention remembers what an earlier step found not to matter; sliding tiles give every cube of 64 tokens one
fixed window of cubes around it; top-k blocks choose anew in every pass, for each cube of queries, the cubes whose mean
key suits its mean query best. {html.escape(comparison_sentence(comparison))}</p>
<div class="panel">{_svg(comparison_figure(comparison))}</div>
<div class="panel">{_table_html(comparison_rows(comparison))}</div>
<p class="small">At each point, the share of tiles computed over the whole run. Each window has a top-k run that
computes exactly as many tiles, of 64 by 64; LiteAttention's are 64 by 128 and their share follows from the threshold.
Its step after the dense ones computes everything, which weighs more in a short run. LiteAttention's rule had a part in
the loss that trained this model, windows and top-k had none; and all heads have the same window, where the method's
authors search one for each.</p>"""


def write_html(result: Result, path: Path) -> None:
    """Write the page; everything it needs is inside it."""
    dense = result.runs[0]
    best = result.runs[-1]
    middle = result.runs[1 + (len(result.runs) - 2) // 2]
    kept, spent = proportion(best, dense)
    grid = result.grid
    options, dense_steps = result.options, result.options["dense_first"]
    quality = "equal to the dense one" if best.psnr is None or best.psnr >= 98.9 else f"{best.psnr:.1f} dB"
    cards = [
        (f"{1 - best.kept_share:.0%}", f"of all tiles skipped at {best.name}, dense first steps included"),
        (quality, "PSNR against the dense video" + ("" if len(options["seeds"]) == 1 else ", the mean over the clips")),
        (f"{dense.attention_total / best.attention_total:.2f}x", "faster attention over the whole run"),
        (f"{dense.total_seconds / best.total_seconds:.2f}x", "faster overall, all other layers included"),
    ]
    study = ""
    if result.curve:
        curve = result.curve
        at = curve["curves"][-1]["skipped_at_db"].get("35")
        reached = "" if at is None else f" There, {at:.0%} of the tiles are skipped at a mean of 35 dB."
        study = (
            f" The grey curves are a study with {len(curve['seeds'])} other seeds on {html.escape(curve['device'])}, "
            f"the rule emulated in plain torch.{reached}"
        )
    with plt.rc_context(STYLE):
        kept_picture, quality_picture, time_picture = kept_figure(result), quality_figure(result), time_figure(result)
        maps = ""
        if middle.last_maps:
            maps = f"""
<h2>What is left of the map</h2>
<p>Keep maps of the last step ({middle.name}) for a sparse, a middling and a dense head: black tiles are computed.
One row is a query tile, a cube of 4 frames by 16 by 16 pixels; one column is a KV tile, two such cubes.</p>
<div class="panel">{map_figure(middle)}</div>
<p>The same three heads in the picture: what the cube with the orange frame still looks at, in its own frames and in
the others. Pale regions are skipped.</p>
<div class="panel">{reach_figure(middle, grid)}</div>"""
        comparison = "" if result.comparison is None else _comparison_html(result.comparison)
    told = {name: value for name, value in result.made_with.items() if isinstance(value, str)}
    environment = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in told.items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>LiteAttention: the same video with fewer tiles</title><style>{CSS}</style></head><body><main>
<h1>The same video with fewer tiles</h1>
<p class="lead">A small video diffusion transformer denoises {math.prod(grid):,} tokens in {options["steps"]} steps,
from the same noise each time: once densely, and with LiteAttention, which stops computing the parts of attention that
an earlier step found not to matter.</p>
<div class="cards">{"".join(f'<div class="card"><b>{big}</b><span>{text}</span></div>' for big, text in cards)}</div>
{_videos_html(result)}
<h2>What it costs and what it saves</h2>
<div class="panel">{_table_html(rows(result))}</div>
<p class="small">Tiles kept: mean over all steps, layers, heads and guidance branches. The first {dense_steps} steps
are dense, and the step after them still computes everything because it only writes the first map. 'All of it' includes
the linear layers, which skipping does not touch. PSNR and relative L2 compare with the dense video.</p>
<h2>Time falls with the tiles</h2>
<p>{html.escape(proportion_sentence(result))} In exact proportion each pair would be equal; at {best.name} the time
is {spent / kept:.2f} times the proportional one.</p>
<div class="two"><div class="panel">{time_picture}</div><div class="panel">{quality_picture}</div></div>
<p class="small">Left: every attention pass of this run. Right: large dots are this run, of {len(options["seeds"])}
clip(s).{study}</p>
{comparison}<h2>Where it skips</h2>
<p>Each step can only drop more: the maps carry over from step to step. Bright is dense.</p>
<div class="panel">{kept_picture}</div>{maps}
<h2>How this was made</h2>
<p>The rule: a tile of 64 queries by 128 keys is dropped for the steps that follow when none of its scores comes within
the threshold (in powers of two, so -10 is a thousandth) of its row's best so far. Model, training data and training
are described in <code>examples/video_dit/README.md</code>; it is a 7-million-parameter toy, so judge what skipping
changes rather than how well it draws.</p>
<div class="panel"><dl>{environment}<dt>options</dt><dd>{html.escape(json.dumps(options))}</dd></dl></div>
<script type="application/json" id="results">{json.dumps(facts(result)).replace("<", chr(92) + "u003c")}</script>
</main></body></html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
