"""Models in fp32 whose attention layers meet autocast."""

import pytest
import torch

from lite_attention.layers import AttentionBackendEnum, LocalAttention, set_forward_context
from support.layer_models import DiT, Metadata, layer, qkv, rotary_embedding, text, video

TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN = list(AttentionBackendEnum)[:4]
# On a GPU a layer for fp32 gets no backend of ours, so there it is made for what autocast gives it.
devices = pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)]
)


@torch.no_grad()
@devices
@pytest.mark.parametrize("backend", [TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN])
def test_a_model_gives_under_autocast_what_it_gives_in_fp32(
    backend: AttentionBackendEnum, device: str, dtype: torch.dtype
) -> None:
    x, words = video(0).to(device), text().to(device)

    def run(model: DiT, device: str) -> torch.Tensor:
        with set_forward_context(0, Metadata(backend, device, dtype).of_step(0)):
            return model(x.to(device), words.to(device))

    expected = run(DiT(backend, blocks=1), "cpu")
    with torch.autocast(device, torch.bfloat16):
        out = run(DiT(backend, dtype=dtype, blocks=1).to(device), device)
    assert float((out.cpu() - expected).norm() / expected.norm()) < 0.02


@torch.no_grad()
@devices
@pytest.mark.parametrize("backend", [TORCH_SDPA, LITE_ATTN])
def test_inputs_of_several_dtypes_become_autocast_s(
    backend: AttentionBackendEnum, device: str, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(device) for x in qkv(60))
    freqs_cis = tuple(x.to(device) for x in rotary_embedding(60))
    attend = layer(LocalAttention, backend, dtype=dtype)
    with torch.autocast(device, torch.bfloat16):
        out = attend(q, k, v.bfloat16(), freqs_cis)
    expected = layer(LocalAttention, backend, dtype=torch.bfloat16)(q.bfloat16(), k.bfloat16(), v.bfloat16(), freqs_cis)
    assert torch.equal(out, expected)
    with pytest.raises(TypeError, match=r"LocalAttention: . has dtype torch\.\w+, expected torch\.\w+"):
        attend(q, k, v.bfloat16(), freqs_cis)
