"""Exchanges between ranks, against the same data on one."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh

from lite_attention.parallel.collectives import all_gather, all_reduce, start_shift
from lite_attention.parallel.exchange import HeadExchange, even_spans, gather_heads, scatter_heads
from lite_attention.parallel.mesh import RankGroup, sequence_mesh
from lite_attention.parallel.shards import gather_sequence, shard_sequence
from support.ranks import mesh_of, run_on_ranks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _whole(device: str, batch: int = 2, tokens: int = 12, heads: int = 8, head_dim: int = 3) -> torch.Tensor:
    shape = batch, tokens, heads, head_dim
    return torch.arange(float(torch.Size(shape).numel())).view(shape).to(device)


def _scatter_and_back(device: str, ring: int, ulysses: int, batch: int, head_dim: int) -> None:
    mesh = sequence_mesh(mesh_of(device, ring, ulysses), "test")
    whole = _whole(device, batch, head_dim=head_dim)
    local = shard_sequence(whole, mesh)
    torch.testing.assert_close(gather_sequence(local, mesh), whole, rtol=0, atol=0)
    tokens, heads = 12 // ring, 8 // ulysses
    expected = whole[:, mesh.ring.rank * tokens :][:, :tokens, mesh.ulysses.rank * heads :][:, :, :heads]
    scattered = scatter_heads(local, mesh.ulysses)
    torch.testing.assert_close(scattered, expected, rtol=0, atol=0)
    torch.testing.assert_close(gather_heads(scattered, mesh.ulysses), local, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize(("batch", "head_dim"), [(1, 4), (2, 4), (2, 3)])  # 3: not a multiple of 8 bytes
def test_scattered_heads_are_those_of_the_whole_and_come_back(
    device: str, ring: int, ulysses: int, batch: int, head_dim: int
) -> None:
    run_on_ranks(ring * ulysses, device, _scatter_and_back, device, ring, ulysses, batch, head_dim)


def _unequal_parts(device: str) -> None:
    mesh = sequence_mesh(mesh_of(device, 1, 2), "test")
    whole = _whole(device)
    local = shard_sequence(whole, mesh)
    spans = ((0, 3), (4, 8)), ((2, 3), (0, 2))
    exchange = HeadExchange(mesh.ulysses, spans)
    scattered, other = exchange.start_scatter(local, -local).wait()
    (start, end), (other_start, other_end) = (of_tensor[mesh.ulysses.rank] for of_tensor in spans)
    torch.testing.assert_close(scattered, whole[:, :, start:end], rtol=0, atol=0)
    torch.testing.assert_close(other, -whole[:, :, other_start:other_end], rtol=0, atol=0)
    pieces = exchange.start_gather(scattered).wait()
    torch.testing.assert_close(torch.cat(pieces, 2), local[:, :, [0, 1, 2, 4, 5, 6, 7]], rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_may_get_unequally_many_heads(device: str) -> None:
    run_on_ranks(2, device, _unequal_parts, device)


def _shards(tokens: int) -> tuple[list[int], list[float]]:
    mesh = sequence_mesh(mesh_of("cpu", 2, 2), "test")
    shard = shard_sequence(torch.arange(1.0, tokens + 1).view(1, tokens, 1), mesh)
    return list(shard.shape), gather_sequence(shard, mesh, tokens).flatten().tolist()


@pytest.mark.parametrize("tokens", [1, 5, 8, 9])
def test_shards_are_equally_long_and_gather_to_the_sequence(tokens: int) -> None:
    for shape, gathered in run_on_ranks(4, "cpu", _shards, tokens):
        assert shape == [1, -(-tokens // 4), 1]
        assert gathered == [float(token) for token in range(1, tokens + 1)]


def _shift_and_gather(device: str) -> tuple[list[float], list[float], list[float]]:
    mesh = sequence_mesh(mesh_of(device, 4, 1), "test")
    own = torch.full((1, 2), float(mesh.ring.rank), device=device)
    shifted = start_shift(own, mesh.ring).wait()
    along_0, along_1 = (all_gather(own, mesh.ring, dim) for dim in (0, 1))
    return shifted.flatten().tolist(), along_0[:, 0].tolist(), along_1.flatten().tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_a_shift_brings_the_previous_rank_s_tensor(device: str) -> None:
    for rank, (shifted, along_0, along_1) in enumerate(run_on_ranks(4, device, _shift_and_gather, device)):
        assert shifted == [(rank - 1) % 4] * 2
        assert along_0 == [0, 1, 2, 3]
        assert along_1 == [0, 0, 1, 1, 2, 2, 3, 3]


def _gradients(device: str) -> None:
    group = sequence_mesh(mesh_of(device, 1, 2), "test").ulysses
    weights = _whole(device)
    local = torch.ones(2, 6, 8, 3, device=device, requires_grad=True)
    scattered = scatter_heads(local, group)
    scattered.backward(weights[:, :, 4 * group.rank :][:, :, :4])
    torch.testing.assert_close(local.grad, weights[:, 6 * group.rank :][:, :6], rtol=0, atol=0)
    share = torch.ones(2, 12, 4, 3, device=device, requires_grad=True)
    gather_heads(share, group).backward(weights[:, 6 * group.rank :][:, :6])
    torch.testing.assert_close(share.grad, weights[:, :, 4 * group.rank :][:, :, :4], rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_travel_back(device: str) -> None:
    run_on_ranks(2, device, _gradients, device)


def _transformed() -> list[str]:
    group = sequence_mesh(mesh_of("cpu", 1, 2), "test").ulysses
    x, func = torch.randn(2, 3, 4, 8), torch.func
    there = functools.partial(scatter_heads, group=group)
    compiled = torch.compile(there, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), there(x))

    def dual(send: Callable[[Tensor], Tensor]) -> None:
        with forward_ad.dual_level():
            send(forward_ad.make_dual(x, x))

    leaf = x.clone().requires_grad_()
    arrived = there(leaf)
    texts = []
    for attempt in (
        lambda: func.jvp(there, (x,), (x,)),
        lambda: func.grad(lambda x: there(x).sum())(x),
        lambda: func.vmap(there)(torch.stack([x, x])),
        lambda: func.jvp(func.vmap(there), (torch.stack([x, x]),), (torch.stack([x, x]),)),
        lambda: func.vmap(func.grad(lambda x: there(x).sum()))(torch.stack([x, x])),
        lambda: dual(there),
        lambda: func.jvp(lambda x: all_gather(x, group, 1), (x,), (x,)),
        lambda: func.jvp(lambda x: all_reduce(x, group), (x,), (x,)),
        lambda: torch.autograd.grad(arrived, leaf, torch.stack([arrived, arrived]), is_grads_batched=True),
        lambda: dual(compiled),
        lambda: torch.compile(func.vmap(there), backend="eager")(torch.stack([x, x])),
    ):
        with pytest.raises(Exception, match="expected none: it would be lost") as raised:
            attempt()
        assert "NotImplementedError" in f"{type(raised.value).__name__}: {raised.value}"
        texts.append(str(raised.value).removeprefix("NotImplementedError: ").partition(", expected")[0])
    assert torch.equal(compiled(x), there(x))
    constant = func.jvp(lambda y: there(x) + there(y.detach()) + y.sum(), (x,), (x,))[0]
    assert torch.equal(constant, 2 * there(x) + x.sum())  # what needs no derivative travels
    return texts


def test_what_an_exchange_would_lose_is_refused_on_every_rank() -> None:
    tangent, compiled = (
        "has a tangent (torch.func.jvp, torch.autograd.forward_ad)",
        "compiled code is called, or calls it",
    )
    texts = [
        f"HeadExchange: tensor 0 {tangent}",
        "HeadExchange: tensor 0 has a gradient of a transform of torch.func",
        "HeadExchange: tensor 0 has samples of torch.func.vmap",
        "HeadExchange: tensor 0 has samples of torch.func.vmap",
        "HeadExchange: tensor 0 has a gradient of a transform of torch.func",
        f"HeadExchange: tensor 0 {tangent}",
        f"all_gather: x {tangent}",
        f"all_reduce: x {tangent}",
        "backward of an exchange between ranks: gradients are batched (is_grads_batched, vectorize)",
        f"HeadExchange: {compiled}, inside a transform of torch.func or a dual level",
        f"HeadExchange: {compiled}, inside a transform of torch.func or a dual level",
    ]
    assert run_on_ranks(2, "cpu", _transformed) == [texts] * 2


def _unlike_each_other(device: str) -> None:
    group = sequence_mesh(mesh_of(device, 1, 2), "test").ulysses
    whole = _whole(device, tokens=6, head_dim=4)
    spans = even_spans(8, 2)
    exchange = HeadExchange(group, (spans, spans, spans))
    wanted = [sign * torch.cat([whole] * 2, 1)[:, :, slice(*spans[group.rank])] for sign in (1, 2, 3)]
    odd_offset = torch.empty(whole.numel() + 1, device=device)[1:].view(whole.shape).copy_(2 * whole)
    odd_strides = torch.empty(2, 6, 8, 5, device=device)[..., :4].copy_(3 * whole)
    with_gradient = whole.clone().requires_grad_()
    for tensors in ((whole, odd_offset, odd_strides), (with_gradient, 2 * whole, 3 * whole)):
        received = exchange.start_scatter(*tensors).wait()
        torch.testing.assert_close([x.detach() for x in received], wanted, rtol=0, atol=0)
    received[0].sum().backward()
    torch.testing.assert_close(with_gradient.grad, torch.ones_like(whole), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_travel_together_whatever_their_strides_and_gradients(device: str) -> None:
    run_on_ranks(2, device, _unlike_each_other, device)


def _of_another_process_group() -> None:
    mesh = sequence_mesh(mesh_of("cpu", 1, 2), "test")
    x = torch.zeros(1, 2, 2, 1)
    # As a layer has it whose process group was destroyed: a later one, in which this process is another rank, has its name.
    for group in (mesh.ulysses._replace(rank=1 - mesh.ulysses.rank), mesh.ulysses._replace(size=3)):
        for call in (
            lambda group: scatter_heads(torch.zeros(1, 2, 6, 1), group),
            lambda group: all_gather(x, group, 0),
            lambda group: all_reduce(x, group),
            lambda group: start_shift(x, group).wait(),
        ):
            with pytest.raises(RuntimeError, match=r"RankGroup: an exchange .* layers end with their process group"):
                call(group)
    with pytest.raises(RuntimeError, match=r"where there is no process group 'gone', expected rank 0 of 2"):
        all_reduce(x, RankGroup("gone", 2, 0))


def test_a_layer_does_not_go_on_in_another_process_group_of_the_same_name() -> None:
    run_on_ranks(2, "cpu", _of_another_process_group)


def _errors() -> list[str]:
    texts = []
    mesh = sequence_mesh(mesh_of("cpu", 1, 2), "test")
    for attempt in (
        lambda: sequence_mesh("cpu", "test"),  # type: ignore[arg-type]
        lambda: sequence_mesh(init_device_mesh("cpu", (2,)), "test"),
        lambda: sequence_mesh(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), "test"),
        lambda: scatter_heads(torch.zeros(1, 2, 3, 1), mesh.ulysses),
        lambda: gather_heads(torch.zeros(1, 3, 2, 1), mesh.ulysses),
    ):
        try:
            attempt()
        except (TypeError, ValueError) as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def test_errors() -> None:
    texts = [
        "TypeError: test: mesh has type str, expected a DeviceMesh",
        "ValueError: test: mesh has dimensions named nothing, expected 'ring', 'ulysses' or both. Of a larger mesh, pass mesh['ring', 'ulysses']",
        "ValueError: test: mesh has dimensions named 'tp', expected 'ring', 'ulysses' or both. Of a larger mesh, pass mesh['ring', 'ulysses']",
        "ValueError: scatter_heads: x has 3 heads, expected a multiple of the 2 ranks of the group",
        "ValueError: gather_heads: x has 3 tokens, expected a multiple of the 2 ranks",
    ]
    assert run_on_ranks(2, "cpu", _errors) == [texts] * 2
