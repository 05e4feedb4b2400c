"""With which kernels the figures of a record were measured, and whether those are the kernels of these sources."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "cmake"))
from revision import kernel_hash  # what a build of these sources tells as its KERNEL_HASH

__all__ = ["kernel_hash", "made_with", "marked", "other_kernels"]

Record = Mapping[str, Any]
MARK = "†"
SEPARATOR = "| ---"


def made_with(record: Record) -> str:
    """The kernels of a record, in words."""
    revision = f"revision {record['revision']}"
    if record["kernel_hash"] is None:  # what was measured before libraries told it: the revision is not the library's
        return f"kernels unknown (checkout {record['revision']})"
    return f"kernels {record['kernel_hash']}, {revision}"


def other_kernels(record: Record) -> str | None:
    """That a record was made with other kernels than those of these sources, or does not tell, as a sentence."""
    if record["kernel_hash"] is None:
        return "Measured before records told their kernels."
    if record["kernel_hash"] == kernel_hash():
        return None
    return f"Measured with the kernels {record['kernel_hash']}, not with those of this source tree."


def marked(text: str, records: Sequence[Record]) -> str:
    """The text of a table with every row marked, and a sentence, if one of its records is of other kernels."""
    others = [told for record in records if (told := other_kernels(record)) is not None]
    if not others:
        return text
    lines, rows = [], False
    for line in text.splitlines():
        rows = line.startswith("|") and (rows or line.startswith(SEPARATOR))
        if rows and not line.startswith(SEPARATOR):
            first, bar, rest = line.removeprefix("| ").partition(" |")
            line = f"| {first} {MARK}{bar}{rest}"
        lines.append(line)
    return "\n".join([*lines, "", f"{MARK} {' '.join(dict.fromkeys(others))}"])
