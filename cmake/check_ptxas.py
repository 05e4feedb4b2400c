"""Compile CUDA sources, and tell where the machine code is not what the kernels were written for.

ptxas takes it for no failure to give up things that a Hopper kernel lives on: it spills registers to memory, ignores a
register budget (setmaxnreg), or makes asynchronous matrix instructions (wgmma) wait for one another. Here each is a
warning, or an error that fails the build.

    check_ptxas.py error nvcc ... -o kernel.o      compiler launchers, which also keep what nvcc said in
    check_ptxas.py warning nvcc ... -o kernel.o    kernel.o.ptxas; another one may stand before nvcc
    check_ptxas.py table build                     prints one table of all kernels compiled below a folder
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_LOG_SUFFIX = ".ptxas"
# What `nvcc -Xptxas -v` says of a kernel, or of a function that was not inlined into one.
_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)'")
_PROPERTIES = re.compile(
    r"Function properties for (?P<name>\S+)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:\s+ptxas info\s*: Used (?P<registers>\d+) registers)?"
)
# The family tells that setmaxnreg is ignored, that wgmma is serialized, or that waits were put between them.
_LOSS = re.compile(r"\(C75\d\d\) .*")
_CHATTER = re.compile(r"ptxas info |^\s+\d+ bytes stack frame")


@dataclass(frozen=True)
class Function:
    """What ptxas made of a kernel or a function; sizes in bytes."""

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def functions(output: str) -> list[Function]:
    """The functions that a compiler output tells of; those that are no kernels have no registers of their own."""
    return [
        Function(match["name"], int(match["registers"] or 0), *(int(match[i]) for i in ("stack", "stores", "loads")))
        for match in _PROPERTIES.finditer(output)
    ]


def problems(output: str) -> list[str]:
    """One sentence for each thing in a compiler output that the kernels were not written for."""
    found = [
        f"{_readable(function.name)} spills registers: {function.spill_stores} bytes stored, "
        f"{function.spill_loads} bytes loaded"
        for function in functions(output)
        if function.spill_stores or function.spill_loads
    ]
    found += _LOSS.findall(output)
    understood = {function.name for function in functions(output) if function.registers}
    found += [
        f"ptxas says nothing of {_readable(match['name'])} that cmake/check_ptxas.py can read"
        for match in _ENTRY.finditer(output)
        if match["name"] not in understood
    ]
    return found


def table(outputs: dict[str, str]) -> str:
    """What the kernels of several sources take; `outputs` maps a source's name to its compiler output."""
    rows = [["source", "registers", "stack", "spilled", "kernel"]]
    for source, output in outputs.items():
        for function in functions(output):
            spilled = function.spill_stores + function.spill_loads
            counts = [str(count) for count in (function.registers, function.stack, spilled)]
            rows.append([source, *counts, _readable(function.name)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _readable(name: str) -> str:
    """A mangled name as the source has it, without namespaces, result and arguments."""
    filter_command = shutil.which("c++filt")
    if filter_command is None:
        return name
    done = subprocess.run([filter_command, name], capture_output=True, text=True, check=True)
    text = done.stdout.strip().replace("(anonymous namespace)::", "").removeprefix("void ")
    text = re.sub(r"\b\w+::", "", text)
    return re.sub(r"\((?!\w+\)\d).*\)$", "", text)  # keeps enumerators, which read as (Walk)0


def _compile(severity: str, command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    compiled = Path(command[command.index("-o") + 1])
    for line in done.stdout.splitlines():
        if not _CHATTER.search(line):
            print(line)
    if done.returncode:
        return done.returncode
    compiled.with_name(compiled.name + _LOG_SUFFIX).write_text(done.stdout)
    found = problems(done.stdout)
    for problem in found:
        print(f"{compiled.stem}: {severity}: {problem}")
    if found and severity == "error":
        compiled.unlink()
        return 1
    return 0


def _print_table(folder: Path) -> int:
    logs = sorted(folder.rglob(f"*{_LOG_SUFFIX}"))
    if not logs:
        print(f"{folder} holds no compiled CUDA sources", file=sys.stderr)
        return 1
    print(table({log.name.split(".")[0]: log.read_text() for log in logs}))
    return 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["error" | "warning" as severity, *command]:
            sys.exit(_compile(severity, command))
        case ["table", folder]:
            sys.exit(_print_table(Path(folder)))
        case _:
            sys.exit(__doc__)
