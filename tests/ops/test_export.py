"""torch.export and AOTInductor: what leaves Python carries its skip state along."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lite_attention import LiteAttention, exportable
from lite_attention.integrations.diffusers import LiteAttentionHandle, enable_lite_attention
from lite_attention.skipping.map_table import MAP_SLOTS
from support.models import Model, noise, same_state
from support.packages import run_in_another_process
from support.video_models import CASES, make_latents, make_transformer

STEPS = 4
WAN = CASES["wan"]
WAN_INPUTS = [
    # The last is the first step of a second generation.
    WAN.inputs(make_latents(WAN, step), timestep)
    for step, timestep in enumerate((999.0, 800.0, 600.0, 1000.0))
]


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


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_exported_model_steps_like_eager(strict: bool) -> None:
    model = prepared_model()
    expected = expected_outputs(model)
    with torch.no_grad():
        with exportable(model):
            program = torch.export.export(model, (noise(0),), strict=strict)
        for exported in (program, program.run_decompositions()):
            runnable = copy.deepcopy(exported).module()
            outs = [runnable(noise(step % 2)) for step in range(STEPS)]
            torch.testing.assert_close(outs, expected, atol=1e-5, rtol=1e-5)
    mutated = set(program.run_decompositions().graph_signature.buffers_to_mutate.values())
    for block in range(2):
        names = ("state.live", "state.slots.0.words", "state.slots.0.stamp")
        assert {f"blocks.{block}.attn.{name}" for name in names} <= mutated
    assert same_state(model, prepared_from(model)), "exporting does not advance the model's own state"


def through_file(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_a_program_shares_its_state_with_the_model_and_copies_of_it_have_their_own(strict: bool) -> None:
    model = prepared_model()
    expected = expected_outputs(model)
    with torch.no_grad():
        with exportable(model):
            program = torch.export.export(model, (noise(0),), strict=strict)
        for copied in (copy.deepcopy(program), through_file(program)):
            step = copied.module()
            torch.testing.assert_close([step(noise(i % 2)) for i in range(STEPS)], expected, atol=1e-5, rtol=1e-5)
        runners = (program.module(), model, program.module(), model)
        outs = [runner(noise(i % 2)) for i, runner in enumerate(runners)]
    torch.testing.assert_close(outs, expected, atol=1e-5, rtol=1e-5)


def lengths_of(layer: LiteAttention) -> list[int]:
    return sorted(shape.query_len for _, shape in layer.state.owners())


def test_a_program_and_its_model_share_maps_however_many_other_shapes_the_model_has_met() -> None:
    model = prepared_model()
    twin = copy.deepcopy(model)
    exported = noise(0).shape[1]
    with torch.no_grad():
        with exportable(model):
            program = torch.export.export(model, (noise(0),)).module()
        for index in range(3):
            program(noise(index))  # a video whose map is no other's
        for length in (*range(exported - 64, exported - 136, -8), exported - 64):
            model(noise(0)[:, :length])
        first = next(model.layers())
        assert exported in lengths_of(first)
        assert len(lengths_of(first)) == MAP_SLOTS + 1, "beside it there is room for as many as before"
        for layer in model.layers():
            layer.reset_skip_state()
        for index, runner in enumerate((model, program, model, program)):
            torch.testing.assert_close(runner(noise(index % 2)), twin(noise(index % 2)), atol=1e-5, rtol=1e-5)
    assert same_state(model, twin)


def prepared_from(model: Model) -> Model:
    fresh = copy.deepcopy(model)
    for layer in fresh.layers():
        layer.reset_skip_state()
    return fresh


def test_exporting_before_any_call_says_what_to_do() -> None:
    message = "call the module once on inputs of this shape and branch"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message), exportable(Model(1)) as model:
        torch.export.export(model, (noise(0),))


@pytest.mark.slow
def test_aot_inductor_package_steps_like_eager_in_another_process(tmp_path: Path) -> None:
    model = prepared_model()
    expected = expected_outputs(model)
    with torch.no_grad(), exportable(model):
        program = torch.export.export(model, (), {"x": noise(0)})
    outs = run_in_another_process(program, [{"x": noise(step % 2)} for step in range(STEPS)], tmp_path)
    torch.testing.assert_close(outs, expected, atol=1e-5, rtol=1e-5)


def wan(blocks: int) -> tuple[nn.Module, LiteAttentionHandle]:
    transformer = make_transformer(WAN)
    transformer.blocks = transformer.blocks[:blocks]
    return transformer, enable_lite_attention(transformer, threshold=-3.0)


def prepared_wan(blocks: int) -> nn.Module:
    """As a user prepares it: one call makes room for the state, and the next starts a generation."""
    transformer, handle = wan(blocks)
    with torch.no_grad():
        transformer(**WAN_INPUTS[1])
    handle.reset()
    return transformer


def wan_outputs(blocks: int) -> list[Tensor]:
    transformer, handle = wan(blocks)
    with torch.no_grad():
        outs = [transformer(**inputs)[0] for inputs in WAN_INPUTS]
        handle.disable()
        dense = [transformer(**inputs)[0] for inputs in WAN_INPUTS]
    # What is skipped shows in the values, in the steps that skip.
    differs = [float((out - other).abs().max()) > 1e-3 for out, other in zip(outs, dense, strict=True)]
    assert differs == [False, True, True, False]
    return outs


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_exported_wan_steps_like_eager_over_two_generations(strict: bool) -> None:
    with torch.no_grad():
        with exportable(prepared_wan(2)) as transformer:
            program = torch.export.export(transformer, (), WAN_INPUTS[0], strict=strict)
        step = program.module()
        outs = [step(**inputs)[0] for inputs in WAN_INPUTS]
    torch.testing.assert_close(outs, wan_outputs(2), atol=1e-5, rtol=1e-5)
    clocks = [name for name in program.graph_signature.buffers if name.endswith("clock.state.steps")]
    assert len(clocks) == 1, "AOTInductor refuses a buffer that is written under two names"


@pytest.mark.slow
def test_aot_inductor_package_of_wan_steps_like_eager_in_another_process(tmp_path: Path) -> None:
    """Of one block, as compiling takes its time."""
    with torch.no_grad(), exportable(prepared_wan(1)) as transformer:
        program = torch.export.export(transformer, (), WAN_INPUTS[0])
    outs = run_in_another_process(program, WAN_INPUTS, tmp_path)
    torch.testing.assert_close([out for (out,) in outs], wan_outputs(1), atol=1e-5, rtol=1e-5)
