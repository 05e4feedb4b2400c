"""diffusers' transformers on the GPU: unchanged when nothing is dropped, compiled as they are eagerly."""

import copy
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lite_attention.integrations.diffusers import enable_lite_attention
from support.inputs import GPU
from support.video_models import CASES, VideoCase, make_latents, make_transformer, run

pytestmark = pytest.mark.gpu

TIMESTEPS = (900.0, 700.0, 500.0, 300.0)
every_model = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def on_gpu(case: VideoCase) -> nn.Module:
    return make_transformer(case).to(GPU, torch.bfloat16)


def denoise(transformer: nn.Module, case: VideoCase, batch: int = 2) -> list[Tensor]:
    steps = enumerate(TIMESTEPS)
    return [run(transformer, case, gpu_latents(case, step, batch), timestep) for step, timestep in steps]


def gpu_latents(case: VideoCase, step: int, batch: int = 2) -> Tensor:
    return make_latents(case, step, batch).to(GPU, torch.bfloat16)


@every_model
def test_output_is_unchanged_when_nothing_is_dropped(case: VideoCase) -> None:
    """Up to the rounding of bf16: no further from the model in fp32 than twice what torch's attention is."""
    transformer = on_gpu(case)
    exact = denoise_in_fp32(transformer, case)
    errors = [float((out.float() - right).norm()) for out, right in zip(denoise(transformer, case), exact, strict=True)]
    handle = enable_lite_attention(transformer, threshold=-math.inf)
    for out, right, error in zip(denoise(transformer, case), exact, errors, strict=True):
        assert float((out.float() - right).norm()) <= 2 * error
    assert all(layer.keep_map().all() for layer in handle.layers.values())


def denoise_in_fp32(transformer: nn.Module, case: VideoCase) -> list[Tensor]:
    exact = copy.deepcopy(transformer).float()
    steps = enumerate(TIMESTEPS)
    return [run(exact, case, gpu_latents(case, step).float(), timestep) for step, timestep in steps]


@every_model
def test_tiles_drop_and_the_output_stays_close(case: VideoCase) -> None:
    transformer = on_gpu(case)
    dense = denoise(transformer, case)
    handle = enable_lite_attention(transformer, threshold=-6.0)
    for _ in range(2):
        outs = denoise(transformer, case)
        fractions = handle.skip_fraction()
        assert (fractions[:, 0] == 0).all()
        assert (fractions[:, 1:] > 0.02).all()
        for out, right in zip(outs, dense, strict=True):
            assert float((out - right).float().norm() / right.float().norm()) < 0.05


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *itertools.product(["wan", "hunyuan"], ["default", "reduce-overhead"]),
        ("wan", "max-autotune-no-cudagraphs"),  # of one model: it takes minutes to time the candidates
    ],
)
def test_compiled_it_does_what_it_does_eagerly(name: str, mode: str) -> None:
    """Inductor rounds elsewhere than eager does, so maps and outputs are compared between two compiled models."""
    case = CASES[name]
    transformer = on_gpu(case)
    enable_lite_attention(transformer, threshold=-6.0)
    eager = copy.deepcopy(transformer)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(transformer, fullgraph=True, mode=mode)
    for _ in range(2):
        for step, timestep in enumerate(TIMESTEPS):
            torch.compiler.cudagraph_mark_step_begin()
            out = run(compiled, case, gpu_latents(case, step), timestep).clone()
            expected = run(eager, case, gpu_latents(case, step), timestep)
            assert float((out - expected).float().norm() / expected.float().norm()) < 0.05
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"], "the graphs are meant to be captured"


def test_repeated_blocks_cost_as_many_compiles_as_without() -> None:
    """One, and another for the strides of the first block's input, which are those of a convolution's output."""
    case, counter, plain_counter = CASES["wan"], CompileCounter(), CompileCounter()
    transformer, plain = on_gpu(case), on_gpu(case)
    handle = enable_lite_attention(transformer, threshold=-6.0, must_do=[0, 10])
    eager = copy.deepcopy(transformer)
    plain.compile_repeated_blocks(fullgraph=True, backend=plain_counter)
    denoise(plain, case)
    torch._dynamo.reset()
    transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    for out, expected in zip(denoise(transformer, case), denoise(eager, case), strict=True):
        assert torch.equal(out, expected)
    handle.set_must_do([20, 40])
    handle.set_threshold(-1.0)
    denoise(transformer, case)
    assert counter.frame_count == plain_counter.frame_count
    assert counter.frame_count <= 2


def test_a_transformer_moved_to_the_gpu_afterwards_takes_its_state_along() -> None:
    case = CASES["wan"]
    transformer = make_transformer(case)
    handle = enable_lite_attention(transformer, threshold=-6.0, must_do=[0, 10])
    transformer.to(GPU, torch.bfloat16)
    denoise(transformer, case)
    assert (handle.skip_fraction()[:, 1:] > 0.02).all()
