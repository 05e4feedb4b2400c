"""LiteAttention: what it computes, what it remembers and when it forgets it."""

import copy
import io
import itertools
import logging
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lite_attention import (
    LiteAttention,
    SeqParallelLiteAttention,
    SkipPolicy,
    attention,
    pack_keep_map,
    skip_branch,
    unpack_keep_map,
)
from lite_attention.skipping.branches import MAX_BRANCHES
from lite_attention.skipping.map_table import MAP_SLOTS
from support.inputs import DTYPES, Case, check_attention, make_qkv
from support.passes import CASE, THRESHOLD, by_hand, dropped_something, kept, passes


def test_passes_are_the_operator_with_the_map_carried_along() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    for (q, k, v), (out, lse, keep) in zip(passes(), by_hand(passes()), strict=True):
        mine, my_lse = layer(q, k, v, return_softmax_lse=True)
        assert torch.equal(mine, out)
        assert torch.equal(my_lse, lse)
        assert torch.equal(kept(layer), keep)
    assert dropped_something(keep, 6)


def test_first_pass_computes_everything() -> None:
    q, k, v = passes(count=1)[0]
    out, lse = LiteAttention(threshold=0.0)(q, k, v, return_softmax_lse=True)
    check_attention(out, lse, q, k, v, None, None, CASE.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_has_the_shape_and_dtype_of_query(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(CASE, dtype)
    for enable in (True, False):
        layer = LiteAttention(enable_skipping=enable)
        assert layer(q, k, v).shape == q.shape
        out, lse = layer(q, k, v, return_softmax_lse=True)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert (lse.shape, lse.dtype) == ((2, 4, 400), torch.float32)


def test_scale_is_the_fourth_argument() -> None:
    q, k, v = passes(count=1)[0]
    expected = attention(q, k, v, scale=0.3)[0]
    dense = LiteAttention(enable_skipping=False)
    assert torch.equal(dense(q, k, v, 0.3), expected)
    assert torch.equal(dense(q, k, v, scale=0.3), expected)
    assert not torch.equal(dense(q, k, v), expected)


def test_a_scalar_of_numpy_is_a_scale() -> None:
    q, k, v = passes(count=1)[0]
    layer = LiteAttention(threshold=THRESHOLD)
    assert torch.equal(layer(q, k, v, np.float32(0.5)), LiteAttention(threshold=THRESHOLD)(q, k, v, 0.5))


@pytest.mark.parametrize("policy", [SkipPolicy(threshold=THRESHOLD), SkipPolicy(threshold=THRESHOLD, dense_steps=4)])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_a_pass_inside_a_transform_is_refused_and_leaves_the_state_alone(policy: SkipPolicy, transform: str) -> None:
    inputs = passes()
    layer, other = LiteAttention(policy=policy), LiteAttention(policy=policy)

    def total(q: Tensor) -> Tensor:
        return layer(q, *inputs[1][1:]).sum()  # type: ignore[no-any-return]

    ask = {
        "vmap": lambda q: torch.vmap(total)(torch.stack([q, q])),
        "grad": torch.func.grad(total),
        "jvp": lambda q: torch.func.jvp(total, (q,), (q,)),
    }[transform]
    for q, k, v in inputs:
        with pytest.raises(NotImplementedError, match=r"^LiteAttention: query is inside a transform of torch\.func"):
            ask(q)
        assert torch.equal(layer(q, k, v), other(q, k, v))
        assert torch.equal(layer.keep_map(), other.keep_map())
        assert torch.equal(layer.state.passes, other.state.passes)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("kv_lens", torch.tensor([[90], [99]], dtype=torch.int32)),
        ("start_full", torch.tensor([False, True])),
        ("generation", torch.tensor([1, 2])),
        *(
            (name, torch.tensor([[[0, 8]], [[8, 16]]]))
            for name in ("must_do_list", "must_skip_list", "must_do_queries")
        ),
    ],
)
def test_any_argument_inside_a_transform_is_refused_and_leaves_the_state_alone(name: str, values: Tensor) -> None:
    layer = LiteAttention(policy=SkipPolicy(threshold=THRESHOLD, dense_steps=4))
    q, k, v = (x[:1] for x in passes(count=1)[0])
    for branch in range(MAX_BRANCHES):  # all room is taken
        layer(q, k, v, branch=branch)
    before = {key: buffer.clone() for key, buffer in layer.state.named_buffers()}
    owners = layer.state.owners()
    with pytest.raises(NotImplementedError, match=rf"^LiteAttention: {name} is inside a transform of torch\.func"):
        torch.vmap(lambda x: layer(q[:, :40], k, v, **{name: x}))(values)
    assert layer.state.owners() == owners
    assert all(torch.equal(buffer, before[key]) for key, buffer in layer.state.named_buffers())


def test_disabled_is_the_dense_operator_and_leaves_the_state_alone() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    inputs = passes(count=3)
    for q, k, v in inputs[:2]:
        layer(q, k, v)
    before = layer.keep_map()
    layer.enable_skip_optimization(enable=False)
    other = make_qkv(Case(batch=1, query_len=77, kv_len=99), torch.float32)
    assert torch.equal(layer(*other), attention(*other)[0])
    assert torch.equal(layer(*inputs[0]), attention(*inputs[0])[0])
    assert torch.equal(layer.keep_map(), before)
    layer.enable_skip_optimization()
    assert torch.equal(layer(*inputs[2]), by_hand(inputs)[2][0])


def test_kv_lens_mask_padded_batches() -> None:
    q, k, v = passes(count=1)[0]
    kv_lens = torch.tensor([700, 333], dtype=torch.int32)
    for layer in (LiteAttention(), LiteAttention(enable_skipping=False)):
        out, lse = layer(q, k, v, return_softmax_lse=True, kv_lens=kv_lens)
        check_attention(out, lse, q, k, v, None, kv_lens, CASE.scale)


# Thresholds


def test_a_new_threshold_acts_from_the_next_pass_on() -> None:
    inputs = passes(count=2)
    layer = LiteAttention(threshold=-math.inf)
    layer(*inputs[0])
    assert layer.keep_map().all()
    layer.set_threshold(threshold=THRESHOLD)
    assert layer.threshold == THRESHOLD
    layer(*inputs[1])
    assert torch.equal(kept(layer), by_hand(inputs[1:])[0][2])


def test_setting_the_threshold_writes_in_place() -> None:
    layer = LiteAttention()
    buffer = layer.state.threshold
    layer.set_threshold(-2)
    assert layer.state.threshold is buffer
    assert float(buffer) == -2.0
    layer.set_threshold([-1.0, -2.0])
    per_head = layer.state.threshold
    layer.set_threshold(torch.tensor([-3.0, -4.0], dtype=torch.float64))
    assert layer.state.threshold is per_head
    assert per_head.tolist() == [-3.0, -4.0]
    assert layer.threshold == (-3.0, -4.0)


def test_each_head_can_have_its_own_threshold() -> None:
    inputs = passes(count=1)
    per_head = [-math.inf, -10.0, -3.0, 0.0]
    layer = LiteAttention(threshold=per_head)
    layer(*inputs[0])
    for head, threshold in enumerate(per_head):
        assert torch.equal(kept(layer)[:, head], by_hand(inputs, threshold)[0][2][:, head])


@pytest.mark.parametrize("value", ["1", "TRUE", "anything"])
def test_debug_permits_thresholds_above_zero(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LITE_ATTENTION_DEBUG", value)
    layer = LiteAttention(threshold=5.0)
    layer.set_threshold(math.inf)
    layer(*passes(count=1)[0])
    assert bool((layer.keep_map().sum(-1) == 1).all())
    monkeypatch.setenv("LITE_ATTENTION_DEBUG", "FALSE")
    layer.set_threshold(1.0)  # read at construction, not now
    with pytest.raises(ValueError, match=r"threshold is 1\.0, expected at most 0"):
        LiteAttention(threshold=1.0)


@pytest.mark.parametrize("value", [None, "", "FALSE"])
def test_thresholds_above_zero_need_debug(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("LITE_ATTENTION_DEBUG", raising=False)
    else:
        monkeypatch.setenv("LITE_ATTENTION_DEBUG", value)
    with pytest.raises(ValueError, match=r"threshold is 0\.1, expected at most 0"):
        LiteAttention().set_threshold(0.1)
    LiteAttention(threshold=0)


# Memory: resets, shapes, branches


def test_a_reset_forgets_and_keeps_the_memory() -> None:
    inputs = passes()
    layer = LiteAttention(threshold=THRESHOLD)
    for q, k, v in inputs:
        layer(q, k, v)
    addresses = [buffer.data_ptr() for buffer in layer.state.buffers()]
    assert float(layer.skip_fraction()) > 0
    layer.reset_skip_state()
    assert float(layer.skip_fraction()) == 0
    assert layer.keep_map().all()
    assert layer.keep_map().shape == (2, 4, 7, 6)
    for (q, k, v), (out, _, keep) in zip(inputs, by_hand(inputs), strict=True):
        assert torch.equal(layer(q, k, v), out)
        assert torch.equal(kept(layer), keep)
    assert [buffer.data_ptr() for buffer in layer.state.buffers()] == addresses


OTHERS = {
    "longer": CASE._replace(query_len=420, kv_len=720),
    "another tile count": CASE._replace(kv_len=900),
    "smaller batch": CASE._replace(batch=1),
    "more heads": CASE._replace(heads=8),
    "other key heads": CASE._replace(kv_heads=4),
    "another head dim": CASE._replace(head_dim=128),
    "same map size, another key count": CASE._replace(kv_len=699),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_change_of_shape_starts_from_the_full_map_both_ways(other: Case) -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    mine, theirs = passes(count=6), passes(other, count=6)
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        for inputs in (mine[part], theirs[part]):
            for (q, k, v), (out, _, keep) in zip(inputs, by_hand(inputs), strict=True):
                assert torch.equal(layer(q, k, v), out)
                assert torch.equal(kept(layer), keep)
            assert dropped_something(keep, layer.keep_map().shape[-1])


def test_a_change_of_dtype_starts_from_the_full_map() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    inputs = passes(count=2)
    layer(*inputs[0])
    half = tuple(x.half() for x in inputs[1])
    layer(*half)
    assert torch.equal(kept(layer), by_hand([half])[0][2])


def test_more_shapes_and_branches_than_slots_stay_correct() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    sizes = [CASE._replace(batch=1, query_len=200 + 10 * i) for i in range(MAP_SLOTS + 3)]
    for _, (branch, case) in itertools.product(range(2), enumerate(sizes)):
        inputs = passes(case, count=2)
        for (q, k, v), (out, _, keep) in zip(inputs, by_hand(inputs), strict=True):
            assert torch.equal(layer(q, k, v, branch=branch % 3), out)
            assert torch.equal(kept(layer, branch % 3), keep)
    slots = [slot.words for slot in layer.state.slots]
    assert len(slots) == MAP_SLOTS


def test_branches_do_not_see_each_other() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    streams = [passes(seed=0), passes(seed=1), passes(seed=2)]
    expected = [by_hand(stream) for stream in streams]
    for step in range(4):
        outs = []
        with skip_branch(1):
            outs.append((1, layer(*streams[1][step])))
            with skip_branch(2):
                outs.append((2, layer(*streams[2][step])))
            assert torch.equal(layer.keep_map(), layer.keep_map(1))
        outs.append((0, layer(*streams[0][step])))
        for branch, out in outs:
            assert torch.equal(out, expected[branch][step][0])
            assert torch.equal(kept(layer, branch), expected[branch][step][2])
    assert len({float(layer.skip_fraction(branch)) for branch in range(3)}) > 1
    layer.reset_skip_state(1)
    assert float(layer.skip_fraction(1)) == 0
    assert float(layer.skip_fraction(2)) > 0


def test_branch_argument_wins_over_the_context() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    with skip_branch(3):
        layer(*passes(count=1)[0], branch=5)
    assert float(layer.skip_fraction(5)) > 0
    assert float(layer.skip_fraction(3)) == 0


def test_batched_guidance_just_works() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    for inputs in (both := passes()):
        layer(*inputs)
    for b in range(2):
        alone = [tuple(x[b : b + 1] for x in inputs) for inputs in both]
        assert torch.equal(kept(layer)[b : b + 1], by_hand(alone)[-1][2])


def test_layers_do_not_share_state() -> None:
    first, second = LiteAttention(threshold=THRESHOLD), LiteAttention(threshold=THRESHOLD)
    for inputs in passes():
        first(*inputs)
    second(*passes(count=1)[0])
    assert torch.equal(kept(second), by_hand(passes(count=1))[0][2])
    assert not torch.equal(kept(second), kept(first))


def test_a_change_of_shape_is_logged_when_verbose(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LITE_ATTENTION_VERBOSE", "1")
    logger = logging.getLogger("lite_attention")
    monkeypatch.setattr(logger, "level", logger.level)
    layer = LiteAttention()
    layer(*make_qkv(CASE, torch.float32))
    assert not caplog.records
    layer(*make_qkv(CASE._replace(query_len=401), torch.float32))
    assert [record.name for record in caplog.records] == ["lite_attention"]
    assert "400 queries" in caplog.text
    assert "401 queries" in caplog.text
    monkeypatch.delenv("LITE_ATTENTION_VERBOSE")
    caplog.clear()
    quiet = LiteAttention()
    for case in (CASE, CASE._replace(query_len=401)):
        quiet(*make_qkv(case, torch.float32))
    assert not caplog.records


# Must-do and must-skip


def test_must_do_tiles_are_computed_and_kept_again() -> None:
    inputs = passes()
    layer = LiteAttention(threshold=THRESHOLD)
    for q, k, v in inputs[:3]:
        layer(q, k, v)
    before = layer.keep_map()
    assert not before[..., 1:3].all()
    # Keys 200 to 299 lie in the tiles 1 and 2.
    out, lse = layer(*inputs[3], None, True, [300, 200])
    must = torch.zeros_like(before)
    must[..., 1:3] = True
    check_attention(out, lse, *inputs[3], pack_keep_map(before | must), None, CASE.scale)
    after = layer.keep_map()
    assert after[..., 1:3].all()
    assert not (after & ~(before | must)).any()


def test_must_skip_tiles_are_left_out_of_this_call_only() -> None:
    inputs = passes(count=3)
    layer = LiteAttention(threshold=THRESHOLD)
    layer(*inputs[0])
    before = layer.keep_map()
    # Of the keys 100 to 639, only the tiles 1 to 4 lie wholly inside; tile 5 is ragged and starts at 640.
    out, lse = layer(*inputs[1], return_softmax_lse=True, must_skip_list=[100, 640])
    visible = before.clone()
    visible[..., 1:5] = False
    check_attention(out, lse, *inputs[1], pack_keep_map(visible), None, CASE.scale)
    after = layer.keep_map()
    assert torch.equal(after[..., 1:5], before[..., 1:5]), "a skipped tile keeps its bit, set or not"
    assert before[..., 1:5].any()
    assert not before[..., 1:5].all()
    out, lse = layer(*inputs[2], return_softmax_lse=True)
    check_attention(out, lse, *inputs[2], pack_keep_map(after), None, CASE.scale)


def test_must_do_wins_over_must_skip() -> None:
    q, k, v = passes(count=1)[0]
    layer = LiteAttention(threshold=THRESHOLD)
    out, lse = layer(q, k, v, None, True, [0, 200], [0, 700])
    only = torch.zeros(2, 4, 7, 6, dtype=torch.bool)
    only[..., :2] = True
    check_attention(out, lse, q, k, v, pack_keep_map(only), None, CASE.scale)
    assert layer.keep_map().all(), "must-do tiles stay kept, skipped ones keep their bit"


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("with_keys", [False, True])
def test_must_do_queries_compute_and_keep_every_tile(with_keys: bool, as_tensor: bool) -> None:
    inputs = passes()
    layer = LiteAttention(threshold=THRESHOLD)
    for q, k, v in inputs[:3]:
        layer(q, k, v)
    before = layer.keep_map()
    # Rows 100 to 139 lie in the query tiles 1 and 2, row 399 in the ragged last one, 6. Keys 200 to 299: tiles 1, 2.
    rows: object = torch.tensor([[100, 140], [399, 500]]) if as_tensor else [100, 140, 399, 400]
    keys = [200, 300] if with_keys else None
    out, lse = layer(*inputs[3], None, True, keys, None, must_do_queries=rows)
    must = torch.zeros_like(before)
    must[:, :, [1, 2, 6]] = True
    if with_keys:
        must[..., 1:3] = True
    assert not before[must].all()
    check_attention(out, lse, *inputs[3], pack_keep_map(before | must), None, CASE.scale)
    after = layer.keep_map()
    assert after[must].all()
    assert not (after & ~(before | must)).any()


def test_a_pass_that_starts_full_does_what_a_reset_does() -> None:
    inputs = passes()
    layer, other = LiteAttention(threshold=THRESHOLD), LiteAttention(threshold=THRESHOLD)
    for step, (q, k, v) in enumerate(inputs):
        if step == 2:
            other.reset_skip_state()
        assert torch.equal(layer(q, k, v, start_full=torch.tensor(step == 2)), other(q, k, v))
        assert torch.equal(layer.keep_map(), other.keep_map())
    assert not layer.keep_map().all()


def test_the_fraction_a_pass_skips_is_that_of_its_map_and_lists() -> None:
    inputs = passes()
    layer = LiteAttention(threshold=THRESHOLD)
    fraction = torch.full((), 7.0)
    layer(*inputs[0], skip_fraction_out=fraction)
    assert fraction == 0.0
    before = layer.keep_map()
    layer(*inputs[1], skip_fraction_out=fraction)
    assert float(fraction) == pytest.approx(1 - float(before.float().mean()))
    visited = layer.keep_map()
    layer(*inputs[2], None, False, [0, 128], [256, 512], must_do_queries=[0, 64], skip_fraction_out=fraction)
    visited[..., 2:4] = False
    visited[..., 0] = True
    visited[:, :, 0] = True
    assert float(fraction) == pytest.approx(1 - float(visited.float().mean()))
    layer.enable_skip_optimization(False)
    layer(*inputs[3], skip_fraction_out=fraction)
    assert fraction == 0.0


def test_a_map_can_be_set_and_broadcast() -> None:
    inputs = passes()
    layer = LiteAttention(threshold=-math.inf)
    layer(*inputs[0])
    chosen = torch.rand(2, 4, 7, 6) < 0.5
    layer.set_keep_map(chosen)
    assert torch.equal(layer.keep_map(), chosen)
    for q, k, v in inputs[:2]:
        out, lse = layer(q, k, v, return_softmax_lse=True)
        check_attention(out, lse, q, k, v, pack_keep_map(chosen), None, CASE.scale)
    assert torch.equal(layer.keep_map(), chosen), "at -inf nothing more is dropped"
    layer.reset_skip_state()
    layer.set_keep_map(chosen[:1, :, :1])
    assert torch.equal(layer.keep_map(), chosen[:1, :, :1].expand(2, 4, 7, 6)), "it counts after a reset too"
    layer.set_keep_map(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    assert layer.keep_map().all()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_fraction_that_cannot_be_written_is_refused_before_the_pass(enabled: bool) -> None:
    inputs, layer = passes(count=2), LiteAttention(threshold=THRESHOLD)
    layer(*inputs[0])
    layer.enable_skip_optimization(enabled)
    before = layer.keep_map()
    with torch.inference_mode():
        made_in_inference = torch.zeros(())
        layer.forward(*inputs[1], branch=1, skip_fraction_out=made_in_inference)  # inside it can be written
    for fraction in (made_in_inference, torch.zeros((), requires_grad=True)):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match="LiteAttention: skip_fraction_out"):
                layer(*inputs[1], skip_fraction_out=fraction, start_full=torch.tensor(True))
    assert torch.equal(layer.keep_map(), before)


def test_a_pass_that_fails_to_write_its_fraction_is_not_remembered() -> None:
    inputs, layer = passes(count=2), LiteAttention(threshold=THRESHOLD)
    layer(*inputs[0])
    before = layer.keep_map()
    with FakeTensorMode():
        fake = torch.zeros(())
    with pytest.raises(Exception, match="FakeTensor"):
        layer(*inputs[1], skip_fraction_out=fake)
    assert torch.equal(layer.keep_map(), before)
    new = LiteAttention(threshold=THRESHOLD)
    with pytest.raises(Exception, match="FakeTensor"):
        new(*inputs[1], skip_fraction_out=fake)
    assert new.used_branches() == []
    assert new.state.owners() == []


def test_a_shallow_copy_shares_the_state_and_a_deep_one_has_its_own() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    shallow, deep = copy.copy(layer), copy.deepcopy(layer)
    layer(*passes(count=1)[0])
    assert shallow.used_branches() == [0]
    assert deep.used_branches() == []


def test_the_layout_version_tells_when_a_captured_graph_is_out_of_date() -> None:
    layer = LiteAttention(threshold=THRESHOLD)

    def grows(change: Callable[[], object]) -> bool:
        before = layer.layout_version
        change()
        return layer.layout_version > before

    q, k, v = passes(count=1)[0]
    for branch in range(MAX_BRANCHES):
        assert not grows(lambda branch=branch: layer(q, k, v, branch=branch)), "free room is taken"
    assert grows(lambda: layer(q[:, 1:], k, v)), "room in use is given away"
    assert not grows(layer.reset_skip_state)
    assert not grows(lambda: layer.set_threshold(-3.0))
    assert not grows(lambda: layer.set_keep_map(layer.keep_map()))
    assert grows(lambda: layer.set_threshold([-3.0] * 4)), "another shape"
    assert not grows(lambda: layer.set_threshold([-4.0] * 4))
    assert not grows(lambda: layer.enable_skip_optimization(True))
    enabled = layer.layout_version
    assert grows(lambda: layer.enable_skip_optimization(False))
    layer.enable_skip_optimization(True)
    assert layer.layout_version == enabled, "a graph captured before is right again"
    assert grows(lambda: layer.to("meta"))


def test_a_forward_that_switches_skipping_is_compiled_once() -> None:
    torch._dynamo.reset()
    counter, layer = CompileCounter(), LiteAttention(threshold=THRESHOLD)
    by_eager = copy.deepcopy(layer)

    def forward(layer: LiteAttention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layer.enable_skip_optimization(False)
        dense = layer(q, k, v)
        layer.enable_skip_optimization(True)
        return dense, layer(q, k, v)

    compiled = torch.compile(forward, backend=counter, fullgraph=True)
    with torch.no_grad():
        counts = []
        for inputs in passes():
            for out, expected in zip(compiled(layer, *inputs), forward(by_eager, *inputs), strict=True):
                assert torch.equal(out, expected)
            counts.append(counter.frame_count)
    assert counts[-1] == counts[1], f"compiled {counts} times so far"


def test_skipping_every_key_gives_zero_and_minus_infinity() -> None:
    q, k, v = passes(count=1)[0]
    layer = LiteAttention(threshold=THRESHOLD)
    out, lse = layer(q, k, v, None, True, None, [0, 700])
    assert not out.any()
    assert bool((lse == -math.inf).all())
    assert layer.keep_map().all()


@pytest.mark.parametrize("ranges", [[80, 60, 45, 40, 12, 2], [2, 12, 40, 45, 60, 80], (12, 2, 40, 45, 80, 60)])
def test_lists_and_tensors_say_the_same(ranges: list[int]) -> None:
    inputs = passes(CASE._replace(head_dim=256, kv_heads=4), count=3)
    as_tensor = torch.tensor(ranges).view(-1, 2)
    layers = [LiteAttention(threshold=0.0) for _ in range(2)]
    for q, k, v in inputs:
        outs = [
            layer(q, k, v, must_do_list=form, must_skip_list=other)
            for layer, form, other in zip(
                layers, (ranges, as_tensor), ([65, 400], torch.tensor([[400, 65], [0, 0]])), strict=True
            )
        ]
        assert torch.equal(*outs)
    assert torch.equal(layers[0].keep_map(), layers[1].keep_map())
    assert not torch.equal(layers[0].keep_map(), unpack_keep_map(by_hand(inputs, 0.0)[-1][2], 11))


def test_empty_lists_ask_for_nothing() -> None:
    q, k, v = passes(count=1)[0]
    assert torch.equal(LiteAttention()(q, k, v, None, False, [], []), LiteAttention()(q, k, v))


def test_must_skip_and_kv_lens_together() -> None:
    q, k, v = passes(count=1)[0]
    kv_lens = torch.tensor([700, 300], dtype=torch.int32)
    layer = LiteAttention(threshold=-math.inf)
    out, lse = layer(q, k, v, None, True, None, [0, 128], kv_lens=kv_lens)
    visible = torch.ones(2, 4, 7, 6, dtype=torch.bool)
    visible[..., 0] = False
    check_attention(out, lse, q, k, v, pack_keep_map(visible), kv_lens, CASE.scale)
    assert layer.keep_map().all()


# An nn.Module among others


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.attn = LiteAttention(threshold=THRESHOLD)
        self.ring = SeqParallelLiteAttention(2, threshold=[-1.0, -2.0])


def test_state_dict_is_untouched() -> None:
    model = Model()
    model.attn(*passes(count=1)[0])
    assert set(model.state_dict()) == {"linear.weight", "linear.bias"}
    Model().load_state_dict(model.state_dict(), strict=True)
    assert [name for name, _ in model.named_parameters()] == ["linear.weight", "linear.bias"]


def test_the_threshold_stays_fp32() -> None:
    model = Model()
    for change in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float64), nn.Module.float):
        change(model)
        assert model.attn.state.threshold.dtype == torch.float32
        assert float(model.attn.state.threshold) == THRESHOLD
        assert all(split.state.threshold.tolist() == [-1.0, -2.0] for split in model.ring._all())


def test_neither_casts_nor_moves_of_the_model_touch_the_state() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    inputs = passes(count=2)
    layer(*inputs[0])
    before = kept(layer)
    for change in (nn.Module.half, lambda m: m.to("meta"), lambda m: m.to_empty(device="cpu"), nn.Module.share_memory):
        change(layer)
        assert torch.equal(kept(layer), before)
        assert float(layer.state.threshold) == THRESHOLD
    assert torch.equal(layer(*inputs[1]), by_hand(inputs)[1][0])


def test_a_module_made_on_meta_works_once_it_is_real() -> None:
    with torch.device("meta"):
        layer = LiteAttention(threshold=THRESHOLD)
    layer.to_empty(device="cpu")
    inputs = passes(count=2)
    for (q, k, v), (out, _, keep) in zip(inputs, by_hand(inputs), strict=True):
        assert torch.equal(layer(q, k, v), out)
        assert torch.equal(kept(layer), keep)


def test_state_follows_the_inputs_to_another_device() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    inputs = passes(count=2)
    layer(*inputs[0])
    out = layer(*(x.to("meta") for x in inputs[1]))
    assert out.device.type == "meta"
    assert layer.state.threshold.device.type == "meta"
    assert torch.equal(layer(*inputs[1]), by_hand(inputs[1:])[0][0])
    assert float(layer.state.threshold) == THRESHOLD


def through_pickle(layer: LiteAttention) -> LiteAttention:
    result: LiteAttention = pickle.loads(pickle.dumps(layer))
    return result


def through_save(layer: LiteAttention) -> LiteAttention:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    result: LiteAttention = torch.load(file, weights_only=False)
    return result


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_save])
def test_copies_carry_the_state_and_then_go_their_own_way(duplicate: object) -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    inputs = passes()
    layer(*inputs[0])
    twin: LiteAttention = duplicate(layer)  # type: ignore[operator]
    assert torch.equal(kept(twin), kept(layer))
    for q, k, v in inputs[1:]:
        twin(q, k, v)
    assert torch.equal(kept(twin), by_hand(inputs)[-1][2])
    assert torch.equal(kept(layer), by_hand(inputs[:1])[0][2])
    twin.set_threshold(-1.0)
    assert float(layer.state.threshold) == THRESHOLD
    own = {buffer.data_ptr() for buffer in layer.state.buffers() if buffer.numel()}
    assert own.isdisjoint(buffer.data_ptr() for buffer in twin.state.buffers() if buffer.numel())


def test_state_made_in_inference_mode_can_be_used_outside_and_back() -> None:
    inputs = passes()
    with torch.inference_mode():
        layer = LiteAttention(threshold=THRESHOLD)
        layer(*inputs[0])
    layer.set_threshold(THRESHOLD)
    with torch.no_grad():
        layer(*inputs[1])
    layer.reset_skip_state()
    layer(*inputs[0])
    with torch.inference_mode():
        layer(*inputs[1])
    assert torch.equal(kept(layer), by_hand(inputs[:2])[1][2])


@pytest.mark.parametrize(
    "transform",
    [
        lambda of: torch.func.grad(lambda x: of(x).sum())(torch.ones(3)),
        lambda of: torch.func.jvp(of, (torch.ones(3),), (torch.ones(3),)),
        lambda of: torch.func.functionalize(of)(torch.ones(3)),
    ],
    ids=["grad", "jvp", "functionalize"],
)
def test_state_made_inside_a_transform_of_torch_func_serves_outside_of_it(transform: Callable[[Any], Any]) -> None:
    inputs = passes()
    made = []

    def of(x: Tensor) -> Tensor:
        made.append(LiteAttention(threshold=THRESHOLD))
        made[0].set_threshold([THRESHOLD] * inputs[0][0].shape[2])
        made[0].reset_skip_state()
        return x * 1

    transform(of)
    for layer in (copy.deepcopy(made[0]), pickle.loads(pickle.dumps(made[0])), made[0]):
        for each in inputs[:2]:
            layer(*each)
        assert torch.equal(kept(layer), by_hand(inputs[:2])[1][2])


def test_repr_tells_the_settings() -> None:
    layer = LiteAttention(policy=SkipPolicy(threshold=-6.0, dense_steps=2))
    layer.enable_skip_optimization(False)
    assert repr(layer) == (
        "LiteAttention(policy=SkipPolicy(threshold=-6.0, dense_steps=2, enabled=False), max_batch_size=4)"
    )


# Introspection


def test_skip_fraction_counts_dropped_tiles() -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    assert float(layer.skip_fraction()) == 0
    for inputs in passes():
        layer(*inputs)
    fraction = layer.skip_fraction()
    assert (fraction.dtype, fraction.shape) == (torch.float32, ())
    assert float(fraction) == pytest.approx(1 - float(layer.keep_map().float().mean()))
    assert 0 < float(fraction) < 1


@pytest.mark.parametrize(("head_dim", "shape"), [(64, (64, 128)), (256, (64, 64))])
def test_tile_shape_is_that_of_the_last_pass(head_dim: int, shape: tuple[int, int]) -> None:
    layer = LiteAttention()
    layer(*make_qkv(Case(head_dim=head_dim), torch.bfloat16))
    assert layer.tile_shape() == shape
    assert layer.keep_map().shape == (1, 2, -(-300 // shape[0]), -(-300 // shape[1]))


# What a CUDA graph may capture


class Recorder(TorchDispatchMode):
    """Notes every operator that runs and the devices of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, set[str]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        self.calls.append((str(func), {x.device.type for x in tensors}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranges", ["none", "lists", "tensors"])
def test_a_pass_neither_waits_for_the_device_nor_copies_from_the_host(ranges: str) -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    inputs = [x.to("meta") for x in passes(count=1)[0]]
    must = {
        "none": (None, None),
        "lists": ([0, 100, 300, 400], [128, 512]),
        "tensors": (torch.zeros(2, 2, dtype=torch.int64, device="meta"),) * 2,
    }[ranges]
    layer(*inputs)  # makes room
    with Recorder() as recorder:
        for _ in range(2):
            layer(*inputs, None, True, *must)
        layer.set_threshold(-1.0)
        layer.reset_skip_state()
        layer.skip_fraction()
    names = [name for name, _ in recorder.calls]
    assert names.count("lite_attention.skip_attention.default") == 2
    assert not {"aten._local_scalar_dense.default", "aten.item.default", "aten.nonzero.default"} & set(names)
    assert not [call for call in recorder.calls if "cpu" in call[1]], "everything stays on the device"


def test_a_first_pass_of_another_shape_copies_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LiteAttention(threshold=THRESHOLD)
    x = torch.empty(1, 300, 2, 64, device="meta")
    layer(x, x, x)

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("values go from the host to the device, which waits for it")

    monkeypatch.setattr(torch, "tensor", refuse)
    with Recorder() as recorder:
        layer(x[:, :200], x, x)
    assert not [call for call in recorder.calls if "cpu" in call[1]]


def test_layers_without_dense_steps_pay_nothing_for_their_count() -> None:
    def kernels(dense_steps: int, **arguments: Tensor) -> str:
        layer = LiteAttention(policy=SkipPolicy(dense_steps=dense_steps))
        inputs = passes(count=1)[0]
        layer(*inputs)  # makes room
        with Recorder() as recorder:
            layer(*inputs, **arguments)
        return " ".join(name.split(".")[1] for name, _ in recorder.calls)

    plain = "select eq eq bitwise_and scalar_tensor where skip_attention copy_ fill_ fill_ select clamp_"
    assert kernels(0) == kernels(1) == plain
    assert kernels(2) == (
        "select eq eq bitwise_and select ge bitwise_and scalar_tensor where skip_attention "
        "select add scalar_tensor where copy_ copy_ fill_ fill_ select clamp_"
    )
    by_a_clock = kernels(0, start_full=torch.tensor(False))
    assert kernels(2, start_full=torch.tensor(False)) == by_a_clock.replace("copy_", "select zero_ copy_")


def test_the_first_dense_steps_compute_everything_and_drop_for_later() -> None:
    layer = LiteAttention(policy=SkipPolicy(threshold=THRESHOLD, dense_steps=2))
    inputs = passes()
    expected = [by_hand(inputs[:1])[0], *by_hand(inputs[1:])]  # the second pass starts from the full map, too
    for (q, k, v), (out, _, _) in zip(inputs, expected, strict=True):
        assert torch.equal(layer(q, k, v), out)
    assert torch.equal(kept(layer), expected[-1][2])
    layer.reset_skip_state()
    assert [torch.equal(layer(*inputs[0]), expected[0][0]) for _ in range(3)] == [True, True, False]


def test_a_branch_that_changes_shape_leaves_the_maps_of_other_branches_alone() -> None:
    layer = LiteAttention(threshold=0.0)
    small, large = torch.randn(1, 300, 1, 8), torch.randn(1, 600, 1, 8)
    keys = torch.cat((small[:, :128], 0.01 * small[:, 128:]), dim=1)  # only the first tile matters
    for branch in range(MAX_BRANCHES):
        layer(small, keys, small, branch=branch)
    before = [float(layer.skip_fraction(branch)) for branch in range(MAX_BRANCHES)]
    layer(large, large, large, branch=3)
    after = [float(layer.skip_fraction(branch)) for branch in range(MAX_BRANCHES)]
    assert min(before) > 0, "the inputs are meant to drop something"
    assert [after[b] for b in range(MAX_BRANCHES) if b != 3] == [before[b] for b in range(MAX_BRANCHES) if b != 3]
    assert layer.keep_map(3).shape == (1, 1, 10, 5)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("branches", [MAX_BRANCHES - 1, MAX_BRANCHES])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_call_that_is_refused_gives_no_map_away(branches: int, compiled: bool) -> None:
    layer = LiteAttention(threshold=0.0)
    small, large = torch.randn(1, 300, 1, 8), torch.randn(1, 600, 1, 8)
    keys = torch.cat((small[:, :128], 0.01 * small[:, 128:]), dim=1)  # only the first tile matters
    for branch in range(branches):
        layer(small, keys, small, branch=branch)
    before = layer.state.owners(), [float(layer.skip_fraction(branch)) for branch in range(branches)]
    assert min(before[1]) > 0
    call = torch.compile(layer, backend="eager") if compiled else layer
    lens = torch.tensor([601], dtype=torch.int32)
    refused = [lens.long(), lens.view(1, 1), lens.to("meta")]
    for kv_lens in refused if compiled else [*refused, lens]:
        with pytest.raises((RuntimeError, TypeError, ValueError), match="kv_lens"):
            call(large, large, large, branch=0, kv_lens=kv_lens)
    layer.set_threshold([-1.0, -2.0])
    with pytest.raises(ValueError, match="threshold has 2 values, expected 1"):
        call(large, large, large, branch=0)
    assert (layer.state.owners(), [float(layer.skip_fraction(branch)) for branch in range(branches)]) == before


def test_a_copy_made_in_inference_mode_works_outside_of_it() -> None:
    layer = LiteAttention()
    x = torch.randn(1, 300, 1, 8)
    layer(x, x, x)
    with torch.inference_mode():
        copied = copy.deepcopy(layer)
    copied.set_keep_map(layer.keep_map())
    copied.set_threshold(layer.threshold)
    assert torch.equal(copied(x, x, x), layer(x, x, x))
    assert torch.equal(kept(copied), kept(layer))
    with torch.inference_mode():
        copied = copy.deepcopy(layer)
    copied.reset_skip_state()
    assert copied.keep_map().all()


def test_thresholds_beyond_fp32_are_infinite_and_a_refused_one_changes_nothing() -> None:
    layer = LiteAttention(threshold=-1e39)
    assert layer.threshold == -math.inf
    layer.set_threshold(-3.0)
    with pytest.raises(ValueError, match="threshold is NaN"):
        layer.set_threshold(math.nan)
    assert layer.threshold == -3.0


def test_numbers_of_numpy_are_numbers() -> None:
    layer = LiteAttention(threshold=np.float32(-2), max_batch_size=np.int64(3))  # type: ignore[arg-type]
    assert (layer.threshold, layer.max_batch_size) == (-2.0, 3)
    layer.set_threshold(np.int64(-3))  # type: ignore[arg-type]
    assert layer.threshold == -3.0
    for thresholds in ([np.float16(-1), np.int8(-2)], np.array([-1, -2]), np.array([-1.0, -2.0], np.float32)):
        layer.set_threshold(thresholds)  # type: ignore[arg-type]
        assert layer.threshold == (-1.0, -2.0)
    layer.set_threshold(np.array(-4.0))  # type: ignore[arg-type]
    x, branch, ranges = torch.randn(1, 300, 1, 8), np.int64(1), list(np.array([0, 128]))
    out = layer(x, x, x, branch=branch, must_skip_list=ranges)
    assert torch.equal(out, LiteAttention()(x, x, x, must_skip_list=[0, 128]))
    assert layer.used_branches() == [1]


def test_tile_shape_follows_compiled_passes() -> None:
    layer = LiteAttention()
    narrow, wide = torch.randn(1, 70, 1, 64), torch.randn(1, 70, 1, 256)
    step = torch.compile(layer, backend="eager")
    for x, expected in ((narrow, (64, 128)), (wide, (64, 64)), (narrow, (64, 128))):
        step(x, x, x)
        assert layer.tile_shape() == expected
