"""The operators under torch.vmap and function transforms, called as they are: what works, and what is said else."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lite_attention import attention, merge_attention, reference, skip_attention, top_k_map, unpack_keep_map
from support.inputs import Case, make_qkv, random_map, report

CASE = Case(batch=2, query_len=130, kv_len=300, heads=4, kv_heads=2)
SAMPLES = 3


def stacked(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of several problems, with one dimension more in front."""
    problems = [make_qkv(CASE, torch.float32, seed=seed + sample) for sample in range(SAMPLES)]
    q, k, v = (torch.stack(tensors) for tensors in zip(*problems, strict=True))
    return q, k, v


@pytest.mark.parametrize("gradients", [False, True])
def test_vmap_gives_each_sample_the_bits_of_its_own_call(gradients: bool) -> None:
    q, k, v = stacked()
    keep = torch.stack([random_map(CASE, 0.5, seed) for seed in range(SAMPLES)])
    scores = torch.randn(SAMPLES, 5, 70)
    calls = {
        "attention": (lambda q, k, v: attention(q, k, v, causal="top-left"), (q, k, v)),
        "attention with a map": (lambda q, k, v, keep: attention(q, k, v, keep=keep), (q, k, v, keep)),
        "skip_attention": (lambda q, k, v, keep: skip_attention(q, k, v, keep, -1.0), (q, k, v, keep)),
        "top_k_map": (lambda scores: (top_k_map(scores, 7),), (scores,)),
    }
    with torch.set_grad_enabled(gradients):
        for name, (call, inputs) in calls.items():
            together = torch.vmap(call)(*inputs)
            alone = zip(*(call(*(x[sample] for x in inputs)) for sample in range(SAMPLES)), strict=True)
            for result, expected in zip(together, alone, strict=True):
                assert torch.equal(result, torch.stack(expected)), name


def test_vmap_over_another_dimension_and_over_the_queries_alone() -> None:
    q, k, v = stacked()
    together = torch.vmap(attention, in_dims=(3, None, None))(q.movedim(0, 3), k[0], v[0])
    for sample in range(SAMPLES):
        alone = attention(q[sample], k[0], v[0])
        assert all(torch.equal(result[sample], expected) for result, expected in zip(together, alone, strict=True))


def parts(*leading: int) -> tuple[Tensor, Tensor]:
    """out and lse of one part, to be merged."""
    return torch.randn(*leading, 2, 9, 4, 64), torch.randn(*leading, 2, 4, 9)


@pytest.mark.parametrize("gradients", [False, True])
def test_vmap_of_a_merge_gives_each_sample_the_bits_of_its_own_call(gradients: bool) -> None:
    out, lse = parts(SAMPLES)
    other, other_lse = parts()
    with torch.set_grad_enabled(gradients):
        along = torch.vmap(lambda out, lse: merge_attention([out, other], [other_lse, lse]), in_dims=(2, 0))
        together = along(out.movedim(0, 2), lse)
        alone = [merge_attention([out[i], other], [other_lse, lse[i]]) for i in range(SAMPLES)]
    for result, expected in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(result, torch.stack(expected))


def transforms(of: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Callable[[], object]]:
    """Every way of torch.func to ask for a derivative of a function from and to tensors."""

    def total(x: Tensor) -> Tensor:
        return of(x).square().sum()

    return {
        "grad": lambda: torch.func.grad(total)(x),
        "grad_and_value": lambda: torch.func.grad_and_value(total)(x)[0],
        "vjp": lambda: torch.func.vjp(total, x)[1](torch.ones(()))[0],
        "jacrev": lambda: torch.func.jacrev(total)(x),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(total))(x[None])[0],
        "grad of vmap": lambda: torch.func.grad(lambda x: torch.vmap(total)(x[None]).sum())(x),
        "grad under no_grad": lambda: torch.no_grad()(torch.func.grad(total))(x),
        "jvp": lambda: torch.func.jvp(total, (x,), (x,)),
        "jvp of vmap": lambda: torch.func.jvp(torch.vmap(total), (x[None],), (x[None],)),
        "jacfwd": lambda: torch.func.jacfwd(lambda y: total(x * y))(torch.ones(())),
        "linearize": lambda: torch.func.linearize(total, x),
        "hessian": lambda: torch.func.hessian(lambda y: total(x * y))(torch.ones(())),
    }


def test_derivatives_of_a_merge_by_every_transform_that_goes_backward() -> None:
    out, lse = parts()
    other, other_lse = parts()

    def total(merge: Callable[..., tuple[Tensor, Tensor]], out: Tensor, lse: Tensor) -> Tensor:
        merged, merged_lse = merge([out, other], [lse, other_lse])
        return merged.square().sum() + merged_lse.sin().sum()

    def exact(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        return reference.merge_attention(outs, lses, compute_dtype=torch.float32)

    inputs = [x.clone().requires_grad_() for x in (out, lse)]
    expected = torch.autograd.grad(total(merge_attention, *inputs), inputs)
    for found in (
        torch.func.grad(lambda *x: total(merge_attention, *x), argnums=(0, 1))(out, lse),
        torch.func.vjp(lambda *x: total(merge_attention, *x), out, lse)[1](torch.ones(())),
        torch.func.jacrev(lambda *x: total(merge_attention, *x), argnums=(0, 1))(out, lse),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    alone = torch.stack([torch.func.grad(lambda x: total(merge_attention, x, lse))(x) for x in (out, 2 * out)])
    together = torch.vmap(torch.func.grad(lambda x: total(merge_attention, x, lse)))(torch.stack((out, 2 * out)))
    torch.testing.assert_close(together, alone)
    second = [
        torch.func.jacrev(torch.func.jacrev(lambda y, merge=merge: total(merge, out * y, lse * y)))(torch.ones(()))
        for merge in (merge_attention, exact)
    ]
    torch.testing.assert_close(*second)


FORWARD = ("jvp", "jvp of vmap", "jacfwd", "linearize", "hessian")


def refusals(of: Callable[[Tensor], Tensor], x: Tensor, names: tuple[str, ...] | None = None) -> str:
    """What each transform says, those with the same words on one line."""
    said: dict[str, list[str]] = {}
    for name, ask in transforms(of, x).items():
        if names is not None and name not in names:
            continue
        said.setdefault(report({"": ask}).removeprefix(" -> "), []).append(name)
    return "\n".join(f"{', '.join(names)}: {words}" for words, names in said.items())


def test_what_has_no_derivative_says_so_to_every_transform() -> None:
    q, k, v = make_qkv(CASE, torch.float32)
    keep = random_map(CASE, 0.5)
    other, lse = parts()
    assert_expected_inline(
        refusals(lambda q: attention(q, k, v)[0], q),
        """\
grad, grad_and_value, vjp, jacrev, vmap of grad, grad of vmap, grad under no_grad: NotImplementedError: attention: has no gradient, it is forward-only; run it under torch.no_grad() or torch.inference_mode(), or detach its inputs
jvp, jvp of vmap, jacfwd, linearize, hessian: NotImplementedError: attention: has no forward-mode gradient (torch.func.jvp); detach its inputs""",
    )
    assert_expected_inline(
        refusals(lambda q: skip_attention(q, k, v, keep, -1.0)[0], q),
        """\
grad, grad_and_value, vjp, jacrev, vmap of grad, grad of vmap, grad under no_grad: NotImplementedError: skip_attention: has no gradient, it is forward-only; run it under torch.no_grad() or torch.inference_mode(), or detach its inputs
jvp, jvp of vmap, jacfwd, linearize, hessian: NotImplementedError: skip_attention: has no forward-mode gradient (torch.func.jvp); detach its inputs""",
    )
    assert_expected_inline(
        refusals(lambda out: merge_attention([out], [lse])[0], other, FORWARD),
        """jvp, jvp of vmap, jacfwd, linearize, hessian: NotImplementedError: merge_attention: has no forward-mode gradient (torch.func.jvp); detach its inputs""",
    )


def test_derivatives_with_respect_to_something_else_are_left_alone() -> None:
    """Where an operator runs inside of a transform that asks nothing of it."""
    q, k, v = make_qkv(CASE, torch.float32)
    out, _ = attention(q, k, v)
    for ask in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        found = ask(lambda factor: (attention(q, k, v)[0] * factor).sum())(torch.ones(()))
        torch.testing.assert_close(found, out.sum())
    around = torch.func.grad(lambda q: (attention(q.detach(), k, v)[0] * 0 + q).sum())(q)
    assert torch.equal(around, torch.ones_like(q))
    scores = torch.randn(3, 40)
    chosen = unpack_keep_map(top_k_map(scores, 5), 40)
    through = torch.func.grad(lambda scores: (unpack_keep_map(top_k_map(scores, 5), 40) * scores).sum())(scores)
    assert torch.equal(through, chosen.float())


@pytest.mark.parametrize("gradients", [False, True])
def test_tangents_are_refused_not_lost(gradients: bool) -> None:
    q, k, v = make_qkv(CASE, torch.float32)
    keep, lse = random_map(CASE, 0.5), torch.zeros(2, 4, 130)

    def jvp(call: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.jvp(call, (q,), (torch.ones_like(q),))[1]

    with torch.set_grad_enabled(gradients):
        assert_expected_inline(
            report(
                {
                    "attention": lambda: jvp(lambda q: attention(q, k, v)[0]),
                    "skip_attention": lambda: jvp(lambda q: skip_attention(q, k, v, keep, -1.0)[0]),
                    "merge_attention": lambda: jvp(lambda out: merge_attention([out], [lse])[0]),
                }
            ),
            """\
attention -> NotImplementedError: attention: has no forward-mode gradient (torch.func.jvp); detach its inputs
skip_attention -> NotImplementedError: skip_attention: has no forward-mode gradient (torch.func.jvp); detach its inputs
merge_attention -> NotImplementedError: merge_attention: has no forward-mode gradient (torch.func.jvp); detach its inputs""",
        )
        around = jvp(lambda q: q + attention(q.detach(), k, v)[0])
    assert torch.equal(around, torch.ones_like(q))
