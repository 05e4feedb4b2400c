"""AOTInductor packages that run in a process of their own."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor


def run_in_another_process(program: torch.export.ExportedProgram, calls: list[dict[str, Tensor]], folder: Path) -> list:
    """What the program's AOTInductor package returns for these keyword arguments, called one after the other."""
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    torch.save(calls, folder / "calls.pt")
    code = f"""
import torch
import torch._inductor.codecache  # torch 2.10 does not load it by itself
import lite_attention  # the operators

step = torch._inductor.aoti_load_package({package!r})
torch.save([step(**call) for call in torch.load({str(folder / "calls.pt")!r})], {str(folder / "outs.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    return torch.load(folder / "outs.pt")
