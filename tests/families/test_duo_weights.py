"""Weights by kind of head: a reordered model computes what it did, and every weight comes back."""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from lite_attention.families.duo import reorder_weights, restore_weights
from support.inputs import report
from support.language_models import HEADS, KV_HEADS, LAYERS, MAKERS, MIXED, WIDTH, make_model, make_tokens

every_model = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def reorder(model: nn.Module, heads: Any = MIXED, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_size": WIDTH,
    }
    return reorder_weights(model, heads, **given | changes)


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


@every_model
def test_a_reordered_model_computes_what_it_did(name: str) -> None:
    model = make_model(name)
    tokens = make_tokens(length=50)
    expected = model(tokens).logits
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    reorder(model)
    assert any(not torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)


@every_model
def test_restoring_gives_every_weight_back_bit_for_bit(name: str) -> None:
    model = make_model(name)
    before = copy.deepcopy(model.state_dict())
    for heads in (MIXED, torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]])):
        reorder(model, heads)
        assert model.state_dict().keys() == before.keys(), "nothing is added to what is saved"
        restore_weights(model)
        assert_same_weights(model, before)


def test_full_heads_come_first_and_keep_their_order() -> None:
    model = make_model("qwen3")
    before = copy.deepcopy(model.state_dict())
    reorder(model, [[0, 1, 0, 1], [1, 1, 1, 1]])
    after = model.state_dict()
    head_dim, group = 16, HEADS // KV_HEADS
    for letter, heads_of_each in (("q", group), ("k", 1), ("v", 1)):
        old = before[f"model.layers.0.self_attn.{letter}_proj.weight"].split(heads_of_each * head_dim)
        expected = torch.cat([old[head] for head in (1, 3, 0, 2)])
        assert torch.equal(after[f"model.layers.0.self_attn.{letter}_proj.weight"], expected)
    old = before["model.layers.0.self_attn.o_proj.weight"].split(group * head_dim, 1)
    expected = torch.cat([old[head] for head in (1, 3, 0, 2)], 1)
    assert torch.equal(after["model.layers.0.self_attn.o_proj.weight"], expected)
    for key, weight in before.items():
        if "layers.0.self_attn" not in key or "norm" in key:
            assert torch.equal(after[key], weight), key


def test_the_result_counts_the_full_query_heads_of_each_layer() -> None:
    assert reorder(make_model(), [[0, 1, 0, 1], [0, 0, 0, 0]]) == [4, 0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_stay_where_and_what_they_are(dtype: torch.dtype, device: str) -> None:
    model = make_model("qwen2").to(device, dtype)
    before = copy.deepcopy(model.state_dict())
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    reorder(model, [torch.tensor(row).numpy() for row in MIXED], device=device)
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr(), parameter.dtype) == (places[name], dtype)
        assert parameter.requires_grad
    model.to("cpu")
    restore_weights(model)
    assert_same_weights(model, {name: weight.cpu() for name, weight in before.items()})


def test_a_copy_of_a_reordered_model_knows_that_it_is_one() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    reorder(model)
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="reordered already"):
        reorder(twin)
    restore_weights(twin)
    assert_same_weights(twin, before)


@pytest.mark.parametrize("call", [1, 3, 7])
def test_a_permutation_that_fails_midway_leaves_the_model_as_it_was(call: int) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    for change in (lambda: reorder(model), lambda: restore_weights(model)):
        weights = copy.deepcopy(model.state_dict())
        real, calls = torch.index_select, itertools.count(1)

        def index_select(*args: Any, real: Any = real, calls: Any = calls, **options: Any) -> Any:
            if next(calls) == call:
                raise torch.OutOfMemoryError("no memory")
            return real(*args, **options)

        with mock.patch.object(torch, "index_select", index_select), pytest.raises(torch.OutOfMemoryError):
            change()
        assert_same_weights(model, weights)
        change()
    assert_same_weights(model, before)


def test_a_reordered_model_refuses_weights_whose_order_nobody_knows() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    reorder(model)
    reordered = copy.deepcopy(model.state_dict())
    for which in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(
            RuntimeError, match=r"load_state_dict: the weights of model.layers.0.self_attn are reordered"
        ):
            which.load_state_dict(before)
        assert_same_weights(which, reordered)
        which.load_state_dict({"lm_head.weight": before["lm_head.weight"]}, strict=False)
        restore_weights(which)
        which.load_state_dict(before)
        reorder(which)
        assert_same_weights(which, reordered)


def test_a_part_of_reordered_attention_refuses_weights_too() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    reorder(model)
    reordered = copy.deepcopy(model.state_dict())
    for which in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        part = which.model.layers[0].self_attn.q_proj
        own = {name: before[f"model.layers.0.self_attn.q_proj.{name}"] for name in part.state_dict()}
        with pytest.raises(RuntimeError, match=r"load_state_dict: the weights of Linear are reordered"):
            part.load_state_dict(own)
        assert_same_weights(which, reordered)
        restore_weights(which)
        part.load_state_dict(own)
        assert_same_weights(which, before)


def test_gradients_move_with_their_weights() -> None:
    model, reordered = make_model(), make_model()
    tokens = make_tokens(batch=1, length=20)
    for which in (model, reordered):
        with torch.enable_grad():
            which(tokens).logits.square().mean().backward()
    reorder(reordered)
    for which in (model, reordered):
        torch.optim.SGD(which.parameters(), lr=0.1).step()
    restore_weights(reordered)
    assert_same_weights(reordered, model.state_dict())
    for one, other in zip(model.parameters(), reordered.parameters(), strict=True):
        assert one.grad is other.grad or torch.equal(one.grad, other.grad)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    model.model.layers[-1].self_attn.sinks = nn.Parameter(torch.zeros(HEADS))
    with pytest.raises(ValueError, match="parameter sinks"):
        reorder(model)
    del model.model.layers[-1].self_attn.sinks
    assert_same_weights(model, before)
    reorder(model)


def share_a_projection(model: Any) -> None:
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj = first.q_proj


def share_a_weight(model: Any) -> None:
    first, second = (layer.self_attn for layer in model.model.layers)
    second.k_proj.weight = first.v_proj.weight


def share_memory(model: Any) -> None:
    first, second = (layer.self_attn for layer in model.model.layers)
    width = first.o_proj.weight.shape[1]
    both = torch.randn(width + 1, width)
    first.o_proj.weight, second.o_proj.weight = nn.Parameter(both[:-1]), nn.Parameter(both[1:])


def share_with_another_part(model: Any) -> None:
    model.model.layers[0].mlp.extra = nn.Linear(WIDTH, WIDTH)
    model.model.layers[0].mlp.extra.weight = model.model.layers[1].self_attn.q_proj.weight


def repeat_a_layer(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


SHARING: list[Callable[[Any], None]] = [
    share_a_projection,
    share_a_weight,
    share_memory,
    share_with_another_part,
    repeat_a_layer,
]


@pytest.mark.parametrize("share", SHARING)
@pytest.mark.parametrize("after", [False, True])
def test_what_occurs_twice_is_refused_and_nothing_is_changed(share: Callable[[Any], None], after: bool) -> None:
    model = make_model()
    if after:
        reorder(model)
    share(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"share memory, expected weights of their own|is the same module as"):
        restore_weights(model) if after else reorder(model)
    assert_same_weights(model, before)


def test_weights_that_lie_side_by_side_are_not_shared() -> None:
    model = make_model()
    tokens = make_tokens(length=50)
    expected = model(tokens).logits
    attention = model.model.layers[0].self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    flat = torch.cat([projection.weight for projection in projections])
    for projection, rows in zip(projections, flat.split([len(x.weight) for x in projections]), strict=True):
        projection.weight = nn.Parameter(rows)
    model.lm_head.weight = model.model.embed_tokens.weight  # tied, as models are, and none of ours
    expected = model(tokens).logits
    reorder(model)
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_errors_of_reordering() -> None:
    def changed(change: Callable[[Any], object], name: str = "llama", **given: Any) -> Callable[[], object]:
        def call() -> None:
            model = make_model(name)
            change(model.model.layers[1].self_attn)
            reorder(model, **given)

        return call

    def sharing(share: Callable[[Any], None]) -> None:
        model = make_model()
        share(model)
        reorder(model)

    def quantise(attention: Any) -> None:
        attention.v_proj.weight = nn.Parameter(attention.v_proj.weight.to(torch.int8), requires_grad=False)

    def remove_output(attention: Any) -> None:
        del attention.o_proj

    def widen_norm(attention: Any) -> None:
        attention.q_norm.weight = nn.Parameter(torch.ones(24))

    def offload(attention: Any) -> None:
        attention.to("meta")

    calls: dict[str, Callable[[], object]] = {
        "one layer": lambda: reorder(make_model(), MIXED[:1]),
        "too few heads": lambda: reorder(make_model(), ([0, 1, 0, 1], [0, 1])),
        "one a query head": lambda: reorder(make_model(), torch.ones(LAYERS, HEADS)),
        "one row for all layers": lambda: reorder(make_model(), torch.ones(KV_HEADS)),
        "no table": lambda: reorder(make_model(), 0.25),
        "gates": lambda: reorder(make_model(), torch.full((LAYERS, KV_HEADS), 0.5)),
        "heads that do not divide": lambda: reorder(make_model(), num_attention_heads=6),
        "twice as many heads": lambda: reorder(
            make_model(), [[0, 1] * 4] * LAYERS, num_attention_heads=2 * HEADS, num_key_value_heads=2 * KV_HEADS
        ),
        "another width": lambda: reorder(make_model(), hidden_size=128),
        "another device": lambda: reorder(make_model(), device="cuda"),
        "no decoder": lambda: reorder(nn.Linear(3, 3)),
        "no attention": lambda: reorder(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)])})),
        "quantised": changed(quantise),
        "offloaded": changed(offload),
        "no output projection": changed(remove_output),
        "a norm of odd width": changed(widen_norm, "qwen3"),
        "not reordered": lambda: restore_weights(make_model()),
        "shared": lambda: sharing(share_a_weight),
        "repeated": lambda: sharing(repeat_a_layer),
    }
    assert_expected_inline(
        report(calls),
        """\
one layer -> ValueError: duo.reorder_weights: full_attention_heads has 1 rows, expected 2, one a layer
too few heads -> ValueError: duo.reorder_weights: full_attention_heads[1] has 2 heads, expected 4, one a KV head
one a query head -> ValueError: duo.reorder_weights: full_attention_heads[0] has 8 heads, expected 4, one a KV head
one row for all layers -> TypeError: duo.reorder_weights: full_attention_heads has 1.0 in place of a list, expected a row of 0 and 1 a layer
no table -> TypeError: duo.reorder_weights: full_attention_heads has 0.25 in place of a list, expected a row of 0 and 1 a layer
gates -> ValueError: duo.reorder_weights: full_attention_heads[0][0] is 0.5, expected 0 or 1; sparsify_attention_heads makes such a table
heads that do not divide -> ValueError: duo.reorder_weights: num_attention_heads is 6, expected a multiple of num_key_value_heads, 4
twice as many heads -> ValueError: duo.reorder_weights: layers.0.self_attn.q_proj.weight has shape [64, 64], expected [128, 64] for 16 query heads, 8 KV heads, head_dim 8 and hidden_size 64
another width -> ValueError: duo.reorder_weights: layers.0.self_attn.q_proj.weight has shape [64, 64], expected [64, 128] for 8 query heads, 4 KV heads, head_dim 8 and hidden_size 128
another device -> ValueError: duo.reorder_weights: layers.0.self_attn.q_proj.weight is on cpu, expected cuda, the device given
no decoder -> TypeError: duo.reorder_weights: Linear has no layers, expected model.layers or model.model.layers
no attention -> TypeError: duo.reorder_weights: layers.0 of ModuleDict has no self_attn, expected one
quantised -> TypeError: duo.reorder_weights: layers.1.self_attn.v_proj.weight is a Parameter of torch.int8 on cpu, expected a plain floating-point parameter: reorder before weights are quantised, sharded or offloaded
offloaded -> TypeError: duo.reorder_weights: layers.1.self_attn.q_proj.weight is a Parameter of torch.float32 on meta, expected a plain floating-point parameter: reorder before weights are quantised, sharded or offloaded
no output projection -> ValueError: duo.reorder_weights: layers.1.self_attn has no o_proj, expected q_proj, k_proj and v_proj, or qkv_proj, and o_proj
a norm of odd width -> ValueError: duo.reorder_weights: layers.1.self_attn.q_norm.weight has shape [24], expected [128] for 8 query heads, 4 KV heads, head_dim 16 and hidden_size 64
not reordered -> RuntimeError: duo.restore_weights: the weights of layers.0.self_attn are not reordered, expected duo.reorder_weights before
shared -> ValueError: duo.reorder_weights: layers.0.self_attn.v_proj.weight and layers.1.self_attn.k_proj.weight share memory, expected weights of their own: permuting one would scramble the other
repeated -> ValueError: duo.reorder_weights: layers.1.self_attn is the same module as layers.0.self_attn, expected one for each layer: its weights would be permuted twice""",
    )
