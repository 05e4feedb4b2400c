"""torch.export and AOTInductor: what leaves Python carries its skip state along."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Model, noise, same_state
from torch import Tensor

STEPS = 4


def prepared_model() -> Model:
    """Room for the state is made by one call, and reset so that the exported model starts afresh."""
    model = Model(2)
    with torch.no_grad():
        model(noise(0))
    for layer in model.layers():
        layer.reset_skip_state()
    return model


def expected_outputs(model: Model) -> list[Tensor]:
    eager = copy.deepcopy(model)
    with torch.no_grad():
        outs = [eager(noise(step % 2)) for step in range(STEPS)]
    # The same input twice: the second pass skips, so a state that is lost shows in the values.
    assert max(float((outs[step] - outs[step + 2]).abs().max()) for step in (0, 1)) > 1e-4
    return outs


@pytest.mark.parametrize("strict", [True, False])
def test_exported_model_steps_like_eager(strict: bool) -> None:
    model = prepared_model()
    expected = expected_outputs(model)
    with torch.no_grad():
        program = torch.export.export(model, (noise(0),), strict=strict)
        for exported in (program, program.run_decompositions()):
            runnable = copy.deepcopy(exported).module()
            outs = [runnable(noise(step % 2)) for step in range(STEPS)]
            torch.testing.assert_close(outs, expected, atol=1e-5, rtol=1e-5)
    mutated = set(program.run_decompositions().graph_signature.buffers_to_mutate.values())
    for block in range(2):
        names = ("_live", "_slots.0.words", "_slots.0.stamp")
        assert {f"blocks.{block}.attn.{name}" for name in names} <= mutated
    assert same_state(model, prepared_from(model)), "exporting does not advance the model's own state"


def prepared_from(model: Model) -> Model:
    fresh = copy.deepcopy(model)
    for layer in fresh.layers():
        layer.reset_skip_state()
    return fresh


def test_exporting_before_any_call_says_what_to_do() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="call the module once on inputs of this shape and branch"):
        torch.export.export(Model(1), (noise(0),))


def test_aot_inductor_package_steps_like_eager_in_another_process(tmp_path: Path) -> None:
    model = prepared_model()
    expected = expected_outputs(model)
    with torch.no_grad():
        program = torch.export.export(model, (noise(0),))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save([noise(step % 2) for step in range(STEPS)], tmp_path / "inputs.pt")
    code = f"""
import torch
import torch._inductor.codecache  # torch 2.10 does not load it by itself
import lite_attention  # the operators

step = torch._inductor.aoti_load_package({package!r})
inputs = torch.load({str(tmp_path / "inputs.pt")!r})
torch.save([step(x) for x in inputs], {str(tmp_path / "outputs.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    outs = torch.load(tmp_path / "outputs.pt")
    torch.testing.assert_close(outs, expected, atol=1e-5, rtol=1e-5)
