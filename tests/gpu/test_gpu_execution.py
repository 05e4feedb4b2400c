"""How the operators run on the GPU: the same bits every time, on any stream and device, and in CUDA graphs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from lite_attention import LiteAttention, attention, merge_attention, skip_attention
from support.inputs import GPU, Case, correlated_passes, make_map, make_qkv, random_map

pytestmark = pytest.mark.gpu

T = TypeVar("T")
RUNS = 1000
CASES = [
    Case(batch=2, query_len=1000, kv_len=2000, heads=8, kv_heads=2, head_dim=128),
    Case(batch=1, query_len=4000, kv_len=4000, heads=24, kv_heads=24, head_dim=64),
    Case(batch=1, query_len=777, kv_len=1111, heads=12, kv_heads=12, head_dim=256),
    Case(batch=3, query_len=130, kv_len=5000, heads=5, kv_heads=1, head_dim=40),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def arguments_of(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """All that skip_attention takes."""
    q, k, v = make_qkv(case, torch.bfloat16, "peaked", seed, GPU)
    random = torch.Generator().manual_seed(seed)
    lens = torch.randint(case.kv_len // 2, case.kv_len + 1, (case.batch,), generator=random, dtype=torch.int32)
    return {
        "q": q,
        "k": k,
        "v": v,
        "keep": make_map(("unequal densities", "shared by visit group", "every tile")[seed % 3], case, seed, GPU),
        "threshold": torch.linspace(-6.0, seed, case.heads, device=GPU),
        "must_keep": random_map(case, 0.1, seed, (1, case.heads, 1), GPU),
        "kv_lens": lens.to(GPU),
    }


def bits_differ(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Tensor:
    """Whether any bit does: bool and 0-d, without waiting for the device."""
    of_size = {2: torch.int16, 4: torch.int32}
    pairs = [[x.view(of_size[x.element_size()]) for x in pair] for pair in zip(results, expected, strict=True)]
    return torch.stack([(x != y).any() for x, y in pairs]).any()


@contextlib.contextmanager
def on_another_stream() -> Iterator[torch.cuda.Stream]:
    """A stream that begins after what was launched so far, and that what follows the context waits for."""
    stream, outer = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield stream
    outer.wait_stream(stream)


def captured(run: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """A function that replays ``run`` from a CUDA graph, and the results that it writes."""
    with on_another_stream():
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


def copy_into(static: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in static.items():
        tensor.copy_(values[name])


@cases
def test_a_thousand_runs_give_the_same_bits(case: Case) -> None:
    """With another stream busy, so that blocks start in ever other orders."""
    arguments = arguments_of(case)
    dense = [arguments[name] for name in ("q", "k", "v")]
    expected = skip_attention(**arguments), attention(*dense), attention(*dense, keep=arguments["keep"])
    differs = torch.zeros((), dtype=torch.bool, device=GPU)
    distraction = torch.randn(1024, 1024, device=GPU)
    for repeat in range(RUNS):
        if repeat % 3:
            with torch.cuda.stream(busy := torch.cuda.Stream()):
                busy.wait_stream(torch.cuda.default_stream())
                distraction @ distraction
        differs |= bits_differ(skip_attention(**arguments), expected[0])
        differs |= bits_differ(attention(*dense), expected[1])
        differs |= bits_differ(attention(*dense, keep=arguments["keep"]), expected[2])
    assert not differs


def test_merging_gives_the_same_bits_every_time() -> None:
    outs = list(torch.randn(3, 2, 500, 6, 128, device=GPU).bfloat16())
    lses = list(torch.randn(3, 2, 6, 500, device=GPU))
    expected = merge_attention(outs, lses)
    differs = torch.zeros((), dtype=torch.bool, device=GPU)
    for _ in range(RUNS):
        differs |= bits_differ(merge_attention(outs, lses), expected)
    assert not differs


@cases
def test_operators_run_on_the_current_stream(case: Case) -> None:
    wanted = arguments_of(case, 1)
    outs, lses = (
        [wanted["q"], 2 * wanted["q"]],
        list(torch.randn(2, case.batch, case.heads, case.query_len, device=GPU)),
    )
    expected = *skip_attention(**wanted), *merge_attention(outs, lses)
    arguments = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    late_outs = [torch.zeros_like(out) for out in outs]
    with on_another_stream():
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds, in which another stream would read zeros
        copy_into(arguments, wanted)
        for late, out in zip(late_outs, outs, strict=True):
            late.copy_(out)
        results = *skip_attention(**arguments), *merge_attention(late_outs, lses)
    assert not bits_differ(results, expected)


@cases
def test_streams_do_not_share_scratch_memory(case: Case) -> None:
    each = [arguments_of(case, seed) for seed in range(4)]
    expected = [skip_attention(**arguments) for arguments in each]
    differs = torch.zeros(4, dtype=torch.bool, device=GPU)
    for _ in range(50):
        for index, arguments in enumerate(each):
            with torch.cuda.stream(stream := torch.cuda.Stream()):
                stream.wait_stream(torch.cuda.default_stream())
                differs[index] |= bits_differ(skip_attention(**arguments), expected[index])
    torch.cuda.synchronize()
    assert differs.tolist() == [False] * 4


@pytest.mark.parametrize("stream_too", [False, True])
def test_operators_run_on_the_device_of_their_tensors(stream_too: bool) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, to make current the one that holds no tensor")
    case = CASES[0]
    here = arguments_of(case)
    there = {name: tensor.to("cuda:1") for name, tensor in here.items()}
    with torch.cuda.device(1):
        stream = torch.cuda.Stream() if stream_too else torch.cuda.default_stream()
        stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream), torch.cuda.device(0):
        results = skip_attention(**there)
        merged = merge_attention([results[0], there["q"]], [results[1], results[1]])
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert all(x.device == torch.device("cuda:1") for x in (*results, *merged))
    expected = skip_attention(**here)
    assert not bits_differ(tuple(x.to(GPU) for x in results), expected)
    again = merge_attention([expected[0], here["q"]], [expected[1], expected[1]])
    assert not bits_differ(tuple(x.to(GPU) for x in merged), again)


@cases
def test_a_captured_operator_reads_todays_inputs_maps_and_thresholds(case: Case) -> None:
    static = {name: tensor.clone() for name, tensor in arguments_of(case).items()}
    replay, results = captured(lambda: skip_attention(**static))
    for seed in (1, 2, 3, 0):
        today = arguments_of(case, seed)
        copy_into(static, today)
        replay()
        assert not bits_differ(results, skip_attention(**today))


@cases
@pytest.mark.parametrize("with_map", [False, True])
def test_captured_attention_and_merge(with_map: bool, case: Case) -> None:
    names = ("q", "k", "v", "keep", "kv_lens")[: 5 if with_map else 3]
    static = {name: arguments_of(case)[name].clone() for name in names}

    def run(q: Tensor, k: Tensor, v: Tensor, **maps: Tensor) -> tuple[Tensor, Tensor]:
        parts = attention(q, k, v, **maps), attention(q, k.flip(1), v, **maps)
        return merge_attention(*map(list, zip(*parts, strict=True)))

    replay, results = captured(lambda: run(**static))
    for seed in (1, 2, 0):
        today = {name: arguments_of(case, seed)[name] for name in names}
        copy_into(static, today)
        replay()
        assert not bits_differ(results, run(**today))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_captured_module_keeps_its_state_from_step_to_step(head_dim: int) -> None:
    """Two branches in one graph; a threshold, must-do ranges and a reset change between replays."""
    case = Case(query_len=900, kv_len=900, head_dim=head_dim)
    steps = [step for seed in range(2) for step in correlated_passes(case, torch.bfloat16, 6, seed, GPU)]
    static = dict(zip("qkv", (x.clone() for x in steps[0]), strict=True))
    static["must_do"] = torch.zeros(2, 2, dtype=torch.int32, device=GPU)

    def run(layer: LiteAttention, q: Tensor, k: Tensor, v: Tensor, must_do: Tensor) -> tuple[Tensor, ...]:
        conditional = layer(q, k, v, None, True, must_do)
        return *conditional, *layer(q, k.flip(1), v, None, True, branch=1)

    layer, eager = (LiteAttention(threshold=-4.0).to(GPU) for _ in range(2))
    replay, results = captured(lambda: run(layer, **static))
    layer.reset_skip_state()  # warming up was a pass
    skipped = []
    for step, (q, k, v) in enumerate(steps):
        if step == 3:
            for one in (layer, eager):
                one.set_threshold(-0.5)
        if step == 6:
            for one in (layer, eager):
                one.reset_skip_state()
        must_do = torch.tensor([[100 * step, 100 * step + 50], [0, 0]], dtype=torch.int32, device=GPU)
        today = {"q": q, "k": k, "v": v, "must_do": must_do.clamp(max=900)}
        copy_into(static, today)
        replay()
        assert not bits_differ(results, run(eager, **today))
        for branch in range(2):
            assert torch.equal(layer.keep_map(branch), eager.keep_map(branch))
        skipped.append(float(layer.skip_fraction(0)))
    assert max(skipped) > 0.02, "the inputs are meant to drop something"
    assert skipped[6] < skipped[5], "the reset is meant to bring tiles back"
