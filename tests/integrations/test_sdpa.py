"""The door for models that call torch's scaled_dot_product_attention."""

from collections.abc import Callable, Iterator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention

from lite_attention import skip_branch
from lite_attention.integrations.sdpa import LiteSDPA
from support.inputs import report

HEADS, HEAD_DIM, TOKENS = 2, 32, 1000
WIDTH = HEADS * HEAD_DIM
LAYERS = r"blocks\.\d+"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.text = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        x = x + scaled_dot_product_attention(4 * q, 4 * k, v).transpose(1, 2).flatten(2)
        k, v = self.text(text).unflatten(-1, (2, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return x + scaled_dot_product_attention(q, k, value=v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Runs its blocks in an order that is an argument, so that the order of calls tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, order: tuple[int, ...] = (0, 1)) -> Tensor:
        for index in order:
            x = self.blocks[index](x, text)
        return x


def inputs(step: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    ramp = torch.randn(1, 8, WIDTH, generator=random).repeat_interleave(TOKENS // 8, 1)
    noise = torch.randn(2, 1, TOKENS, WIDTH, generator=random)
    return ramp + 0.1 * noise[0] + 0.01 * step * noise[1], noise[0, :, :20]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def test_nothing_changes_when_nothing_is_dropped() -> None:
    model = Model()
    expected = model(*inputs())
    with LiteSDPA(model, LAYERS, threshold=-torch.inf):
        for _ in range(2):
            torch.testing.assert_close(model(*inputs()), expected, atol=1e-3, rtol=0)


def test_self_attention_skips_inside_the_context_and_only_there() -> None:
    model = Model()
    expected = model(*inputs(1))
    attention = LiteSDPA(model, LAYERS, threshold=-2.0)
    with attention:
        model(*inputs(0))
        skipping = model(*inputs(1))
    fractions = attention.skip_fraction()
    assert list(attention.layers) == ["blocks.0", "blocks.1"]
    assert (fractions > 0.1).all()
    assert not torch.equal(skipping, expected)
    assert torch.equal(model(*inputs(1)), expected), "outside the context, nothing of it is left"
    assert torch.equal(attention.skip_fraction(), fractions)
    assert not any("forward" in vars(module) for module in model.modules())
    with attention:
        model(*inputs(2))
    assert (attention.skip_fraction() >= fractions).all(), "it goes on where it was left"
    attention.reset()
    assert (attention.skip_fraction() == 0).all()


def test_state_belongs_to_the_module_and_not_to_the_order_of_calls() -> None:
    model, swapped = Model(), Model()
    attention, other = LiteSDPA(model, LAYERS, threshold=-2.0), LiteSDPA(swapped, LAYERS, threshold=-2.0)
    x, text = inputs()
    with attention, other:
        for index in (0, 1):
            model.blocks[index](x, text)
        for index in (1, 0):
            swapped.blocks[index](x, text)
    for name, layer in attention.layers.items():
        assert torch.equal(layer.keep_map(), other.layers[name].keep_map())
    assert not torch.equal(attention.layers["blocks.0"].keep_map(), attention.layers["blocks.1"].keep_map())


def test_masked_causal_and_dropout_calls_stay_with_torch() -> None:
    class Odd(nn.Module):
        def forward(self, q: Tensor, kind: str) -> Tensor:
            mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
            given = {"mask": {"attn_mask": mask}, "causal": {"is_causal": True}, "dropout": {"dropout_p": 0.5}}[kind]
            return scaled_dot_product_attention(q, q, q, **given)  # type: ignore[arg-type]

    model = nn.Sequential(Odd())
    q = torch.randn(1, HEADS, TOKENS, HEAD_DIM)
    with LiteSDPA(model, "0") as attention:
        for kind in ("mask", "causal", "dropout"):
            torch.manual_seed(1)
            inside = model[0](q, kind)
            torch.manual_seed(1)
            assert torch.equal(inside, Odd()(q, kind))
    with pytest.raises(RuntimeError, match="has no keep map yet"):
        attention.layers["0"].keep_map()


def test_branches_have_their_own_maps() -> None:
    model = Model()
    with LiteSDPA(model, LAYERS, threshold=-2.0) as attention:
        for step in range(2):
            model(*inputs(step))
            with skip_branch(1):
                model(*inputs(step, seed=1))
    layer = attention.layers["blocks.0"]
    assert not torch.equal(layer.keep_map(0), layer.keep_map(1))


def test_autocast_gives_attention_the_dtype_it_gives_torch() -> None:
    model = Model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs())
        with LiteSDPA(model, LAYERS, threshold=-torch.inf):
            out = model(*inputs())
    assert float((out - expected).norm() / expected.norm()) < 0.01


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = Model()
    with pytest.raises(IndexError), LiteSDPA(model, LAYERS):
        model(*inputs(), order=(7,))
    assert not any("forward" in vars(module) for module in model.modules())


def test_contexts_may_be_nested() -> None:
    model = Model()
    attention = LiteSDPA(model, LAYERS, threshold=-2.0)
    with attention:
        with attention:
            model(*inputs(0))
        model(*inputs(1))
    assert (attention.skip_fraction() > 0.1).all()


def test_one_graph_inside_and_one_outside() -> None:
    counter = CompileCounter()
    model, eager = Model(), Model()
    attention, other = LiteSDPA(model, LAYERS, threshold=-2.0), LiteSDPA(eager, LAYERS, threshold=-2.0)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(4):
        torch.testing.assert_close(compiled(*inputs(step)), eager(*inputs(step)), atol=1e-5, rtol=1e-5)
        with attention, other:
            torch.testing.assert_close(compiled(*inputs(step)), eager(*inputs(step)), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2
    assert (attention.skip_fraction() > 0.1).all()


def test_errors() -> None:
    model = Model()

    def two_calls() -> None:
        with LiteSDPA(model, ""):
            model(*inputs())

    def hidden_call() -> None:
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        layers = nn.ModuleDict({"0": nn.TransformerEncoderLayer(WIDTH, HEADS, batch_first=True)})
        layers["0"].self_attn = attention
        with LiteSDPA(layers, "0"), torch.enable_grad():
            layers["0"].train()(inputs()[0])

    calls: dict[str, Callable[[], object]] = {
        "a call inside of torch": hidden_call,
        "no such layer": lambda: LiteSDPA(model, r"layers\.\d+"),
        "two calls in a module": two_calls,
        "threshold above 0": lambda: LiteSDPA(model, LAYERS, threshold=1.0),
    }
    assert_expected_inline(
        report(calls),
        """\
a call inside of torch -> NotImplementedError: torch.nn.MultiheadAttention calls its attention out of reach, expected a layer that calls torch.nn.functional.scaled_dot_product_attention itself
no such layer -> ValueError: LiteSDPA: layers is layers\\.\\d+, expected to match the name of a module of the Model
two calls in a module -> RuntimeError: LiteSDPA: the model itself makes several self-attention calls in one forward, expected one, to which its skip state belongs. Name its submodules in layers
threshold above 0 -> ValueError: LiteSDPA: threshold is 1.0, expected at most 0 (powers of two; -10 is the default). For experiments above 0, set LITE_ATTENTION_DEBUG""",
    )
