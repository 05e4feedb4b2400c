"""The operators under torch.vmap and function transforms, called as they are: what works, and what is said else."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lite_attention import attention, merge_attention, skip_attention, top_k_map
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


def test_what_vmap_cannot_split_is_named() -> None:
    out, lse = torch.randn(SAMPLES, 1, 9, 2, 64), torch.randn(SAMPLES, 1, 2, 9)
    assert_expected_inline(
        report({"merge_attention": lambda: torch.vmap(lambda out, lse: merge_attention([out], [lse]))(out, lse)}),
        """merge_attention -> RuntimeError: Batching rule not implemented for lite_attention::merge_attention. We could not generate a fallback.""",
    )


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
