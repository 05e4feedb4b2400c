"""The interface of the operators as one value: a hash of the schemas that the files beside this one define.

The build runs this file and puts the value into what it compiles; load.py compares the two, so that Python files and
libraries of two builds do not meet. Only the standard library is needed, and nothing of the package is imported.
"""

import ast
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["operator_interface"]


def _schemas(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "\nSCHEMA = " not in text:  # most of the time goes into parsing
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["SCHEMA"]:
                try:
                    yield ast.literal_eval(node.value)
                except ValueError as error:
                    raise ValueError(
                        f"{path}: SCHEMA is computed, expected a literal that can be read as text"
                    ) from error


def operator_interface(folder: Path = Path(__file__).parent) -> str:
    """16 hex digits that stand for every ``SCHEMA = "..."`` in the files of a folder."""
    return hashlib.sha256("\n".join(sorted(_schemas(folder))).encode()).hexdigest()[:16]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(f'#define LITE_ATTENTION_OPERATOR_INTERFACE "{operator_interface()}"\n')
