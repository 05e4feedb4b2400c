"""DuoAttention's pattern files: which heads must see everything, as its training found it.

A pattern says of every KV head whether it must see the whole sequence (a retrieval head) or does with the first and the
last tokens (a streaming head): arXiv 2410.10819.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DuoPattern", "load_duo_pattern", "save_duo_pattern", "sparsify_attention_heads"]

_GATES_FILE = "full_attention_heads.tsv"
_CONFIG_FILE = "config.json"


class DuoPattern(NamedTuple):
    """What DuoAttention's training found for a model."""

    full_attention_heads: Tensor
    """fp32 ``[layers, KV heads]``, from 0 (streaming does) to 1 (must see everything)."""
    sink_size: int
    recent_size: int


def load_duo_pattern(folder: str | os.PathLike[str]) -> DuoPattern:
    """Read a pattern as mit-han-lab/duo-attention publishes them under ``attn_patterns``.

    Args:
        folder: holds ``full_attention_heads.tsv``, a line for each layer and in it a number for each KV head, and
            ``config.json`` with ``sink_size`` and ``recent_size``.

    Returns:
        The gates, those outside 0 to 1 set to the nearer of the two, and the two sizes in tokens.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file does not hold what it should; the text names the file and the place.
    """
    gates_file, config_file = Path(folder, _GATES_FILE), Path(folder, _CONFIG_FILE)
    for file in (gates_file, config_file):
        if not file.is_file():
            raise FileNotFoundError(f"load_duo_pattern: {file} is missing, expected {_GATES_FILE} and {_CONFIG_FILE}")
    rows: list[list[float]] = []
    for number, line in enumerate(gates_file.read_text().splitlines(), 1):
        if line.strip():
            rows.append(_read_gates(f"load_duo_pattern: {gates_file}, line {number}", line, rows))
    if not rows:
        raise ValueError(f"load_duo_pattern: {gates_file} is empty, expected a line for each layer")
    config = json.loads(config_file.read_text())
    sink_size, recent_size = (_read_size(config_file, config, name) for name in ("sink_size", "recent_size"))
    return DuoPattern(torch.tensor(rows, dtype=torch.float32).clamp(0, 1), sink_size, recent_size)


def _read_size(file: Path, config: object, name: str) -> int:
    size = config.get(name) if isinstance(config, dict) else None
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"load_duo_pattern: {file} has {name} {size}, expected a number of tokens")
    return size


def _read_gates(where: str, line: str, rows_before: list[list[float]]) -> list[float]:
    try:
        row = [float(text) for text in line.split("\t")]
    except ValueError:
        raise ValueError(f"{where} is {line!r}, expected numbers with tabs between them") from None
    if not all(map(math.isfinite, row)):
        raise ValueError(f"{where} is {line!r}, expected finite numbers")
    if rows_before and len(row) != len(rows_before[0]):
        raise ValueError(f"{where} has {len(row)} heads, expected {len(rows_before[0])} as in the first line")
    return row


def save_duo_pattern(
    folder: str | os.PathLike[str], full_attention_heads: Tensor, sink_size: int, recent_size: int
) -> None:
    """Write a pattern that :func:`load_duo_pattern` and mit-han-lab/duo-attention read.

    Args:
        folder: made if it does not exist; files of a pattern in it are replaced.
        full_attention_heads: ``[layers, KV heads]``, gates or a table of 0 and 1.
        sink_size, recent_size: in tokens.

    Raises:
        ValueError: full_attention_heads has not two dimensions.
    """
    if full_attention_heads.dim() != 2:
        raise ValueError(
            f"save_duo_pattern: full_attention_heads has {full_attention_heads.dim()} dimensions, expected 2: "
            "[layers, KV heads]"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = full_attention_heads.double().tolist()
    # 17 digits after the point give every fp64 back exactly.
    lines = ["\t".join(f"{gate:.17e}" for gate in row) + "\n" for row in rows]
    (folder / _GATES_FILE).write_text("".join(lines))
    config = {"sink_size": sink_size, "recent_size": recent_size}
    (folder / _CONFIG_FILE).write_text(json.dumps(config) + "\n")


def sparsify_attention_heads(
    full_attention_heads: Tensor, *, threshold: float | None = None, sparsity: float | None = None
) -> Tensor:
    """Which heads see everything, from the gates of a pattern.

    Args:
        full_attention_heads: ``[layers, KV heads]``, fp32.
        threshold: heads of at least this gate see everything.
        sparsity: share of all heads that stream, 0 to 1: the ``round(sparsity * heads)`` of the smallest gates. Of
            equal gates the one of the earlier layer, then the earlier head, goes on seeing everything.

    Returns:
        bool ``[layers, KV heads]``.

    Raises:
        ValueError: not exactly one of threshold and sparsity is given, or sparsity is out of range.
    """
    if threshold is not None and sparsity is None:
        return full_attention_heads >= threshold
    if sparsity is None or threshold is not None:
        raise ValueError(
            f"sparsify_attention_heads: threshold is {threshold} and sparsity is {sparsity}, expected one of the two"
        )
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsify_attention_heads: sparsity is {sparsity}, expected 0 to 1")
    gates = full_attention_heads.flatten()
    full = gates.numel() - round(sparsity * gates.numel())
    table = torch.zeros_like(gates, dtype=torch.bool)
    table[gates.argsort(descending=True, stable=True)[:full]] = True
    return table.view_as(full_attention_heads)
