"""The xDiT and yunchang doors, in stand-ins that call them as those packages do."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lite_attention import LiteAttention
from lite_attention.integrations.xdit import YunchangAttention, register_lite_attention
from support import xdit_host
from support.xdit_host import (
    ATTENTION_FUNCTION_REGISTRY,
    AttentionBackendType,
    LongContextAttention,
    WanTransformer,
    usp,
)

BACKEND = AttentionBackendType.SDPA
# Drops most tiles of the inputs below.
LOW = -2.0


@pytest.fixture(autouse=True)
def _packages() -> Iterator[None]:
    xdit_host.install()
    yield
    xdit_host.uninstall()


def peaked(length: int = 512, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Each query looks like the key at its place. ``[1, heads, length, 64]``."""
    key, value, noise = torch.randn(3, 1, heads, length, 64)
    return 0.5 * noise + 1.5 * key, key, value


def with_layer(layer: object, **extras: Any) -> dict[str, Any]:
    return {"lite_attention": layer, **extras}


def test_output_and_lse_are_dense_where_nothing_is_dropped() -> None:
    register_lite_attention(BACKEND)
    query, key, value = peaked()
    function = ATTENTION_FUNCTION_REGISTRY[BACKEND]
    for _ in range(2):
        out, lse = function(query, key, value, 0.0, False, with_layer(LiteAttention(threshold=-math.inf)))
        torch.testing.assert_close(out, scaled_dot_product_attention(query, key, value), atol=2e-5, rtol=0)
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse, (query @ key.mT / 8).logsumexp(-1))


def test_a_layer_s_later_calls_skip() -> None:
    register_lite_attention(BACKEND)
    layer = LiteAttention(threshold=LOW)
    query, key, value = peaked()
    dense = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(usp(query, key, value, with_layer(layer)), dense, atol=2e-5, rtol=0)
    assert layer.skip_fraction() > 0.3
    assert (usp(query, key, value, with_layer(layer)) - dense).abs().max() > 1e-3


def test_each_layer_has_the_state_it_brings() -> None:
    register_lite_attention(BACKEND)
    transformer = WanTransformer()
    layers = [LiteAttention(threshold=threshold) for threshold in (LOW, -math.inf)]
    for block, layer in zip(transformer.blocks, layers, strict=True):
        block.attn1.processor.attention_kwargs = with_layer(layer)
    x, context = torch.randn(1, 2, 512, 64), torch.randn(1, 2, 20, 64)
    first = transformer(x, context)
    assert layers[0].skip_fraction() > 0.3
    assert layers[1].skip_fraction() == 0
    assert transformer(x, context).ne(first).any()
    for layer in layers:
        layer.reset_skip_state()
    assert torch.equal(transformer(x, context), first)


def test_calls_without_a_layer_reach_the_function_that_was_registered() -> None:
    calls = []

    def theirs(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append((args, kwargs))
        return args[0], None

    ATTENTION_FUNCTION_REGISTRY[BACKEND] = theirs
    restore = register_lite_attention(BACKEND)
    query, key, value = peaked()
    extras = {"attn_mask": torch.ones(1)}
    assert usp(query, key[:, :, :20], value[:, :, :20], extras) is query
    ((args, _),) = calls
    assert args[3:] == (0.0, False, extras)
    restore()
    assert ATTENTION_FUNCTION_REGISTRY[BACKEND] is theirs


def test_what_others_register_since_stays_when_restored(caplog: pytest.LogCaptureFixture) -> None:
    restore = register_lite_attention(BACKEND)
    ours = ATTENTION_FUNCTION_REGISTRY[BACKEND]
    layer = LiteAttention(threshold=LOW)

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    ATTENTION_FUNCTION_REGISTRY[BACKEND] = theirs
    query, key, value = peaked()
    usp(query, key, value, with_layer(layer))
    restore()
    assert "register_lite_attention: <function" in caplog.text
    assert ATTENTION_FUNCTION_REGISTRY[BACKEND] is theirs
    dense = scaled_dot_product_attention(query, key, value)
    assert torch.equal(usp(query, key, value, with_layer(layer)), dense), "ours, which theirs calls, does nothing more"
    restore()
    assert caplog.text.count("register_lite_attention") == 1


def test_restoring_twice_touches_no_later_registration(caplog: pytest.LogCaptureFixture) -> None:
    restore = register_lite_attention(BACKEND)
    restore()
    register_lite_attention(BACKEND)
    again = ATTENTION_FUNCTION_REGISTRY[BACKEND]
    restore()
    assert ATTENTION_FUNCTION_REGISTRY[BACKEND] is again
    assert caplog.text == ""


def test_keys_that_xdit_cuts_off_as_padding_may_be_missing() -> None:
    register_lite_attention(BACKEND)
    query, key, value = peaked()
    out = usp(query, key, value, with_layer(LiteAttention(), valid_kv_len=500))
    dense = scaled_dot_product_attention(query, key[:, :, :500], value[:, :, :500])
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=0)


def test_ring_attention_is_refused() -> None:
    register_lite_attention(BACKEND)
    xdit_host.parallel.ring = 2
    usp(*peaked())  # other layers may use it
    with pytest.raises(RuntimeError, match="ring attention over 2 ranks, expected none"):
        usp(*peaked(), with_layer(LiteAttention()))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"dropout_p": 0.1}, ValueError, "dropout_p is 0.1"),
        ({"is_causal": True}, ValueError, "a causal mask"),
        (
            {"attention_kwargs": with_layer(torch.nn.Identity())},
            TypeError,
            "has type Identity, expected a LiteAttention",
        ),
        ({"attention_kwargs": with_layer(LiteAttention(), attn_mask=torch.ones(1))}, ValueError, "has attn_mask"),
        ({"attention_kwargs": with_layer(LiteAttention(), indices_k=torch.ones(1))}, ValueError, "has indices_k"),
        ({"key": torch.randn(1, 2, 100, 64)}, ValueError, "100 keys, expected 512: self-attention"),
    ],
)
def test_what_a_layer_cannot_do_is_refused(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    register_lite_attention(BACKEND)
    query, key, value = peaked()
    call = {"query": query, "key": key, "value": value, "dropout_p": 0.0, "is_causal": False}
    call["attention_kwargs"] = with_layer(LiteAttention())
    with pytest.raises(error, match=text):
        ATTENTION_FUNCTION_REGISTRY[BACKEND](**{**call, **arguments})


def test_a_backend_without_a_function_or_registered_twice_is_refused() -> None:
    with pytest.raises(KeyError, match=r"FLASH_3.*expected one that xfuser has a function for"):
        register_lite_attention(AttentionBackendType.FLASH_3)
    with pytest.raises(KeyError, match=r"\[\].*expected one that xfuser has a function for"):
        register_lite_attention([])
    register_lite_attention(BACKEND)
    with pytest.raises(RuntimeError, match=r"registered for .*SDPA.* already"):
        register_lite_attention(BACKEND)


def long_context(threshold: float) -> tuple[LongContextAttention, LiteAttention]:
    layer = LiteAttention(threshold=threshold)
    return LongContextAttention(attn_type="lite_attention", attn_processor=YunchangAttention(layer)), layer


def test_yunchang_s_output_and_lse_are_dense_where_nothing_is_dropped() -> None:
    attention, _ = long_context(-math.inf)
    query, key, value = peaked()
    dense = scaled_dot_product_attention(query, key, value).transpose(1, 2)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    for _ in range(2):
        torch.testing.assert_close(attention(q, k, v), dense, atol=2e-5, rtol=0)
    _, lse = attention.attn_processor(q, k, v)
    torch.testing.assert_close(lse, (query @ key.mT / 8).logsumexp(-1))


def test_yunchang_s_later_calls_skip() -> None:
    attention, layer = long_context(LOW)
    q, k, v = (tensor.transpose(1, 2) for tensor in peaked())
    first = attention(q, k, v)
    assert layer.skip_fraction() > 0.3
    assert (attention(q, k, v) - first).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"dropout_p": 0.1},
        {"window_size": (8, 8)},
        {"window_size": None},
        {"softcap": 1.0},
        {"alibi_slopes": torch.ones(2)},
    ],
    ids=str,
)
def test_what_yunchang_can_ask_for_in_vain_is_refused(options: dict[str, Any]) -> None:
    attention, _ = long_context(LOW)
    q, k, v = (tensor.transpose(1, 2) for tensor in peaked())
    with pytest.raises(ValueError, match=r"YunchangAttention: .*expected"):
        attention(q, k, v, **options)


def test_yunchang_s_ring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, _ = long_context(LOW)
    monkeypatch.setattr(xdit_host.PROCESS_GROUP, "RING_PG", group := object())
    monkeypatch.setattr(torch.distributed, "get_world_size", {group: 4}.__getitem__)
    with pytest.raises(RuntimeError, match="ring attention over 4 ranks, expected none"):
        attention(*(tensor.transpose(1, 2) for tensor in peaked()))


def test_yunchang_s_layer_must_be_one() -> None:
    with pytest.raises(TypeError, match="layer has type Identity, expected a LiteAttention"):
        YunchangAttention(torch.nn.Identity())  # type: ignore[arg-type]
