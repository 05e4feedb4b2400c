"""Every video starts from the full map, whatever each layer did while it began: dense, left out, or with no clock."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lite_attention import LiteAttention, SkipPolicy, attention
from lite_attention.skipping.dense_steps import GenerationClock
from support.passes import video

STEPS = (900.0, 700.0, 500.0, 300.0)
Pass = Callable[[LiteAttention, GenerationClock, int, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def call(layer: LiteAttention, clock: GenerationClock, x: Tensor) -> Tensor:
    out: Tensor = layer(x, x, x, start_full=clock.start_full, generation=clock.generation)
    return out


def first_step_dense(layer: LiteAttention, clock: GenerationClock, step: int, x: Tensor) -> Tensor:
    layer.enable_skip_optimization(step >= 1)
    return call(layer, clock, x)


def first_step_dense_without_number(layer: LiteAttention, clock: GenerationClock, step: int, x: Tensor) -> Tensor:
    layer.enable_skip_optimization(step >= 1)
    out: Tensor = layer(x, x, x, start_full=clock.start_full)
    return out


def left_out_by_a_cache(layer: LiteAttention, clock: GenerationClock, step: int, x: Tensor) -> Tensor:
    return call(layer, clock, x) if step != 0 else x


def dense_by_another_way(layer: LiteAttention, clock: GenerationClock, step: int, x: Tensor) -> Tensor:
    return call(layer, clock, x) if step != 0 else attention(x, x, x)[0]


def generate(run: Pass, layer: LiteAttention, clock: GenerationClock, seed: int) -> list[Tensor]:
    outs = []
    for step, timestep in enumerate(STEPS):
        clock.tick(torch.tensor(timestep))
        outs.append(run(layer, clock, step, video(seed)))
    return outs


RUNS: list[Pass] = [first_step_dense, first_step_dense_without_number, left_out_by_a_cache, dense_by_another_way]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("new_clock", [False, True])
def test_the_second_video_is_made_as_if_it_were_the_first(run: Pass, new_clock: bool) -> None:
    layer, clock = LiteAttention(threshold=-6.0), GenerationClock()
    generate(run, layer, clock, seed=1)
    skipped = float(layer.skip_fraction())
    outs = generate(run, layer, GenerationClock() if new_clock else clock, seed=2)
    alone = LiteAttention(threshold=-6.0)
    expected = generate(run, alone, GenerationClock(), seed=2)
    assert all(map(torch.equal, outs, expected))
    assert skipped > 0.3
    assert 0.3 < alone.skip_fraction() == layer.skip_fraction()


def test_a_reset_of_the_clock_reaches_a_layer_that_is_left_out_when_it_comes() -> None:
    layer, clock = LiteAttention(threshold=-6.0), GenerationClock()
    generate(left_out_by_a_cache, layer, clock, seed=1)
    clock.reset()
    clock.tick(torch.tensor(STEPS[-1] - 100))  # lower than all before: only the reset tells
    clock.tick(torch.tensor(STEPS[-1] - 200))
    x, alone = video(2), LiteAttention(threshold=-6.0)
    assert torch.equal(call(layer, clock, x), alone(x, x, x))


@pytest.mark.parametrize("number", [0, 7])
def test_passes_without_a_number_that_begin_a_video_belong_to_no_numbered_one(number: int) -> None:
    layer, alone, told = LiteAttention(threshold=-6.0), LiteAttention(threshold=-6.0), torch.tensor(number)
    x, other = video(2), video(1)
    if number != 0:
        layer(x, x, x, generation=told)
    layer.reset_skip_state()
    layer(other, other, other)  # to warm up, say
    assert layer.skip_fraction() > 0.3
    assert torch.equal(layer(x, x, x, generation=told), alone(x, x, x))


def chosen_map(layer: LiteAttention) -> Tensor:
    """One that no pass makes by itself: the first KV tile and every other one."""
    chosen = torch.zeros_like(layer.keep_map())
    chosen[..., ::2] = True
    return chosen


@pytest.mark.parametrize("dense_steps", [1, 3])
@pytest.mark.parametrize("before", [None, 5, 7])
@pytest.mark.parametrize("is_reset", [False, True])
def test_a_chosen_map_is_of_the_generation_that_comes_next(
    dense_steps: int, before: int | None, is_reset: bool
) -> None:
    layer = LiteAttention(policy=SkipPolicy(threshold=-math.inf, dense_steps=dense_steps))
    x, told, fraction = video(1), torch.tensor(5), torch.zeros(())
    layer(x, x, x, generation=None if before is None else torch.tensor(before))
    if is_reset:
        layer.reset_skip_state()
    layer.set_keep_map(chosen_map(layer))
    announced = layer.skip_fraction()
    assert announced > 0.3
    for _ in range(2):
        layer(x, x, x, generation=told, skip_fraction_out=fraction)
        assert fraction == announced
    layer(x, x, x, generation=told + 1, skip_fraction_out=fraction)
    assert fraction == 0, "it is no other generation's"


@pytest.mark.parametrize("enabled", [True, False])
def test_a_chosen_map_is_no_other_generations_after_a_pass(enabled: bool) -> None:
    layer, fraction = LiteAttention(threshold=-math.inf), torch.ones(())
    x, told = video(1), torch.tensor(5)
    layer(x, x, x, generation=told)
    for number in (told, *([None] if enabled else [])):
        layer.set_keep_map(chosen_map(layer))
        layer.enable_skip_optimization(enabled)
        layer(x, x, x, generation=number)
        layer.enable_skip_optimization()
        if number is not None:
            layer(x, x, x, generation=number, skip_fraction_out=fraction)
            assert fraction > 0.3
        layer(x, x, x, generation=told + 1, skip_fraction_out=fraction)
        assert fraction == 0


def test_start_full_goes_before_a_chosen_map() -> None:
    layer, fraction = LiteAttention(threshold=-math.inf), torch.ones(())
    x, told = video(1), torch.tensor(5)
    layer(x, x, x, generation=told)
    layer.set_keep_map(chosen_map(layer))
    layer(x, x, x, start_full=torch.tensor(True), generation=told, skip_fraction_out=fraction)
    assert fraction == 0
    assert layer.keep_map().all()


def test_a_chosen_map_counts_in_compiled_code() -> None:
    layer, fraction = LiteAttention(threshold=-math.inf), torch.ones(())
    x, told = video(1), torch.tensor(5)
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    compiled(x, x, x, generation=told, skip_fraction_out=fraction)
    layer.reset_skip_state()
    layer.set_keep_map(chosen_map(layer))
    announced = layer.skip_fraction()
    compiled(x, x, x, generation=told + 1, skip_fraction_out=fraction)
    assert fraction == announced > 0.3
    compiled(x, x, x, generation=told, skip_fraction_out=fraction)
    assert fraction == 0
    assert counter.frame_count == 1


def test_copies_of_a_clock_go_on_with_its_video_and_number_the_next_ones_anew() -> None:
    layer, clock = LiteAttention(threshold=-6.0), GenerationClock()
    generate(dense_by_another_way, layer, clock, seed=1)
    copied = copy.deepcopy(clock)
    assert torch.equal(copied.generation, clock.generation)
    clock.reset()
    copied.reset()
    generate(dense_by_another_way, layer, clock, seed=1)
    outs = generate(dense_by_another_way, layer, copied, seed=2)
    expected = generate(dense_by_another_way, LiteAttention(threshold=-6.0), GenerationClock(), seed=2)
    assert all(map(torch.equal, outs, expected))


def test_the_clock_of_another_process_tells_other_numbers() -> None:
    numbers = (
        "print(GenerationClock().generation.item(), copy.deepcopy(GenerationClock()).state.next_generation.item())"
    )
    code = f"import copy; from lite_attention.skipping.dense_steps import GenerationClock; {numbers}"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert len({number for run in runs for number in run.stdout.split()}) == 4


def test_branches_that_threads_run_at_a_time_are_told_their_own_time() -> None:
    clock, videos, expected = GenerationClock(dense_steps=1), {}, {}
    for timestep in (900.0, 700.0):
        clock.tick(torch.tensor(timestep), branch=0)
    videos[0] = clock.generation.clone()
    clock.tick(torch.tensor(900.0), branch=1)
    clock.reset()
    clock.tick(torch.tensor(900.0), branch=1)
    videos[1] = clock.generation.clone()
    expected = {0: False, 1: True}
    for branch, number in videos.items():
        start_full, generation = clock.told(branch)
        assert (bool(start_full), int(generation)) == (expected[branch], int(number))
    assert videos[0] != videos[1]


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.clock, self.attn = GenerationClock(dense_steps=2), LiteAttention(threshold=-6.0)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.clock.tick(timestep)
        return call(self.attn, self.clock, x)


def test_one_graph_serves_all_steps_and_generations() -> None:
    counter = CompileCounter()
    model, eager = Timed(), Timed()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    fractions = []
    for seed in (1, 2):
        for timestep in map(torch.tensor, STEPS):
            assert torch.equal(compiled(video(seed), timestep), eager(video(seed), timestep))
            fractions.append(float(model.attn.skip_fraction()))
    assert counter.frame_count == 1
    assert min(fractions) > 0.3
