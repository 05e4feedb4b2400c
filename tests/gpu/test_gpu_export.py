"""AOTInductor on the GPU: a package in bf16 steps as eager does, bit for bit, in another process."""

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

from lite_attention import exportable
from support.inputs import GPU
from support.packages import run_in_another_process
from support.stack import Stack, stack_latents, time

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA_HOME is None, reason="AOTInductor compiles against the CUDA toolkit, which is not here"),
]


def test_aot_inductor_package_steps_like_eager_in_another_process(tmp_path: Path) -> None:
    calls = [
        {"hidden_states": stack_latents(generation, step), "timestep": time(generation, step)}
        for generation in range(2)
        for step in range(3)
    ]
    model = Stack().to(GPU)
    with torch.no_grad():
        model(**calls[0])  # makes room for the state
        model.clock.reset()
        eager = copy.deepcopy(model)
        with exportable(model):
            program = torch.export.export(model, (), calls[0])
        expected = [eager(**call) for call in calls]
    assert all(float(layer.skip_fraction()) > 0.02 for layer in eager.layers)
    outs = run_in_another_process(program, calls, tmp_path)
    assert all(map(torch.equal, outs, expected))
