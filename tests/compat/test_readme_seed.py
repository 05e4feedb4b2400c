"""The calls that users of the original LiteAttention have in their models work unchanged, and give attention."""

import inspect
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lite_attention import LiteAttention, SeqParallelLiteAttention, SkipPolicy, merge_attention
from support.inputs import Case, check_attention, correlated_passes

SCALE = 0.11
TEXT_LEN = 77


def full_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    case = Case(batch=2, query_len=700, kv_len=700, heads=3, kv_heads=3)
    return next(correlated_passes(case, torch.float32, passes=1))


def test_signatures() -> None:
    # None stands for the README's True and -10.0, so that they can be told from a policy.
    ours = "enable_skipping: bool | None = None, threshold: Threshold | None = None, max_batch_size: int = 4"
    policy = "*, policy: SkipPolicy | None = None"
    assert str(inspect.signature(LiteAttention)).replace("'", "") == f"({ours}, {policy}) -> None"
    assert str(inspect.signature(SeqParallelLiteAttention)).replace("'", "") == (
        f"(num_nodes: int, {ours}, {policy}) -> None"
    )
    for layer in (LiteAttention(), SeqParallelLiteAttention(2).splits[1]):
        assert layer.policy == SkipPolicy(enabled=True, threshold=-10.0)
        assert layer.max_batch_size == 4
    assert LiteAttention(False, -6.0, 2).policy == SkipPolicy(enabled=False, threshold=-6.0)
    assert SeqParallelLiteAttention(2, False, -6.0, 2).splits[1].policy == SkipPolicy(enabled=False, threshold=-6.0)
    first = ["query", "key", "value", "scale", "return_softmax_lse", "must_do_list", "must_skip_list"]
    assert list(inspect.signature(LiteAttention.forward).parameters)[1:8] == first
    first.insert(3, "split_idx")
    assert list(inspect.signature(SeqParallelLiteAttention.forward).parameters)[1:9] == first


class Layer(nn.Module):
    """A model's attention layer, with the constructor and the calls of the README."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        hidden_states: Tensor = self.attn(query, key, value, scale)
        return hidden_states


def test_basic_usage(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    layer = Layer(LiteAttention(threshold=-6.0))
    expected = full_attention(*qkv, SCALE)
    torch.testing.assert_close(layer(*qkv, SCALE), expected, atol=1e-4, rtol=0)

    calculated_threshold = -0.5
    layer = Layer(LiteAttention())
    layer.attn.set_threshold(threshold=calculated_threshold)
    torch.testing.assert_close(layer(*qkv, SCALE), expected, atol=1e-4, rtol=0)
    skipping = layer(*qkv, SCALE)
    assert float((skipping - expected).abs().max()) > 1e-3, "the second pass skips"

    layer.attn.reset_skip_state()
    torch.testing.assert_close(layer(*qkv, SCALE), expected, atol=1e-4, rtol=0)
    layer.attn.enable_skip_optimization(enable=False)
    torch.testing.assert_close(layer(*qkv, SCALE), expected, atol=1e-4, rtol=0)
    layer.attn.enable_skip_optimization(enable=True)
    assert torch.equal(layer(*qkv, SCALE), skipping)


def test_must_do_list(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    attn = LiteAttention(threshold=0.0)
    must_do_list = [680, 600, 45, 40, 12, 2]
    for _ in range(3):
        attn(*qkv, SCALE, must_do_list=must_do_list)
    keep = attn.keep_map()
    assert keep[..., [0, 4, 5]].all()
    assert not keep[..., 1:4].all()


def test_sequence_parallelism(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = qkv
    attn = SeqParallelLiteAttention(num_nodes=7, threshold=-6.0)
    parts = []
    for split_idx in range(7):
        keys = slice(100 * split_idx, 100 * split_idx + 100)
        hidden_states = attn(query, key[:, keys], value[:, keys], split_idx, SCALE)
        assert hidden_states.shape == query.shape
        parts.append(
            attn(query, key[:, keys], value[:, keys], split_idx, SCALE, return_softmax_lse=True, must_do_list=[100, 0])
        )
    out, _ = merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close(out, full_attention(*qkv, SCALE), atol=1e-4, rtol=0)


def test_text_and_video_tokens(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = qkv
    attn = LiteAttention(enable_skipping=True, threshold=-6.0)
    query_text, query_video = query[:, :TEXT_LEN, :, :], query[:, TEXT_LEN:, :, :]
    key_text, key_video = key[:, :TEXT_LEN, :, :], key[:, TEXT_LEN:, :, :]
    value_text, value_video = value[:, :TEXT_LEN, :, :], value[:, TEXT_LEN:, :, :]

    attn.enable_skip_optimization(enable=False)
    output_t2t, lse_t2t = attn(query_text, key_text, value_text, SCALE, return_softmax_lse=True)
    output_t2v, lse_t2v = attn(query_text, key_video, value_video, SCALE, return_softmax_lse=True)
    output_v2t, lse_v2t = attn(query_video, key_text, value_text, SCALE, return_softmax_lse=True)
    attn.enable_skip_optimization(enable=True)
    output_v2v, lse_v2v = attn(query_video, key_video, value_video, SCALE, return_softmax_lse=True)

    text, text_lse = merge_attention([output_t2t, output_t2v], [lse_t2t, lse_t2v])
    video, video_lse = merge_attention([output_v2t, output_v2v], [lse_v2t, lse_v2v])
    out, lse = torch.cat([text, video], 1), torch.cat([text_lse, video_lse], 2)
    torch.testing.assert_close(out, full_attention(*qkv, SCALE), atol=1e-4, rtol=0)
    check_attention(out, lse, *qkv, None, None, SCALE)


try:
    from lite_attention import LiteAttention as Imported

    LITE_ATTENTION_AVAILABLE = Imported is LiteAttention
except ImportError:
    LITE_ATTENTION_AVAILABLE = False


class WanSelfAttention(nn.Module):
    """A stand-in with the names and the data flow of Wan2.1's class, changed as its users change it."""

    def __init__(self, dim: int, num_heads: int, pass_lens: bool) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.window_size = (-1, -1)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.pass_lens = pass_lens
        if LITE_ATTENTION_AVAILABLE:
            self.lite_attention = LiteAttention(enable_skipping=True, threshold=-10.0)
        else:
            self.lite_attention = None

    def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        b, s, n, d = *x.shape[:2], self.num_heads, self.head_dim
        q = self.norm_q(self.q(x)).view(b, s, n, d)
        k = self.norm_k(self.k(x)).view(b, s, n, d)
        v = self.v(x).view(b, s, n, d)
        q_rope = rope_apply(q, grid_sizes, freqs)
        k_rope = rope_apply(k, grid_sizes, freqs)
        if self.lite_attention is not None:
            q_rope = q_rope.bfloat16()
            k_rope = k_rope.bfloat16()
            v = v.bfloat16()
            if self.pass_lens:  # as docs/module.md has it
                x = self.lite_attention(q_rope, k_rope, v, kv_lens=seq_lens.int())
            else:  # as the original's README has it
                x = self.lite_attention(q_rope, k_rope, v)
            x = x.float()
        else:
            x = flash_attention(q=q_rope, k=k_rope, v=v, k_lens=seq_lens, window_size=self.window_size)
        return self.o(x.flatten(2))


def rope_apply(x: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
    """Wan's rotary embedding: pairs of channels turn by frame, row and column; padding stays as it is. fp32 out."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    third = pairs.shape[-1] // 3
    by_axis = freqs.split([pairs.shape[-1] - 2 * third, third, third], dim=1)
    rotated = pairs.clone()
    for index, sizes in enumerate(grid_sizes.tolist()):
        turns = [
            axis[:size].view([-1 if i == dim else 1 for i in range(3)] + [axis.shape[1]]).expand(*sizes, -1)
            for dim, (axis, size) in enumerate(zip(by_axis, sizes, strict=True))
        ]
        tokens = math.prod(sizes)
        rotated[index, :tokens] *= torch.cat(turns, -1).reshape(tokens, 1, -1)
    return torch.view_as_real(rotated).flatten(-2).float()


def flash_attention(q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor, window_size: tuple[int, int]) -> Tensor:
    """What Wan calls without LiteAttention: keys at and past a sample's length are not attended to."""
    assert window_size == (-1, -1)
    exists = torch.arange(k.shape[1]) < k_lens[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=exists[:, None, None]).transpose(1, 2)


@pytest.mark.parametrize("lens", [[600, 600], [600, 480]], ids=["full", "padded"])
@pytest.mark.parametrize("pass_lens", [False, True], ids=["original", "ours"])
def test_wan_self_attention(pass_lens: bool, lens: list[int]) -> None:
    attention = WanSelfAttention(dim=256, num_heads=2, pass_lens=pass_lens)
    positions = torch.arange(100)[:, None] / 10000 ** (torch.arange(64) / 64)
    freqs = torch.polar(torch.ones(100, 64, dtype=torch.float64), positions.double())
    x, seq_lens = torch.randn(2, 600, 256), torch.tensor(lens)
    grid = torch.tensor([[length // 60, 6, 10] for length in lens])
    x[1, lens[1] :] = 0.0
    with torch.no_grad():
        outs = [attention(x, seq_lens, grid, freqs) for _ in range(3)]
        module, attention.lite_attention = attention.lite_attention, None
        expected = attention(x, seq_lens, grid, freqs)
    assert set(attention.state_dict()) == {
        *(f"{name}.{kind}" for name in "qkvo" for kind in ("weight", "bias")), "norm_q.weight", "norm_k.weight"
    }  # fmt: skip
    differs = not pass_lens and lens[1] < 600
    for out in outs:
        assert out.dtype == torch.float32
        assert (float((out - expected)[1, : lens[1]].abs().max()) > 0.02) == differs, "the padding counts without lens"
        torch.testing.assert_close(out[0], expected[0], atol=3e-3, rtol=0)
        if not differs:
            torch.testing.assert_close(out, expected, atol=3e-3, rtol=0)
    assert module is not None
    assert module.keep_map().shape == (2, 2, 10, 5)
