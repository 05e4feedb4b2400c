"""One denoising step of Wan 2.1 as diffusers has it, with random weights, and kernels put in place of its attention."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import peers
from attention_record import Row
from lite_attention import LiteAttention
from lite_attention.integrations._routing import route_sdpa
from lite_attention.integrations.diffusers import enable_lite_attention
from lite_attention.skipping.cuda_graphs import capture_step
from run import DTYPE
from sustained import in_graph

DEVICE = "cuda"
COMPILE: dict[str, Any] = {"fullgraph": True, "dynamic": False}
FRAMES = 81
# How the video autoencoder shrinks time and space, and the transformer's patches space once more.
FRAMES_IN_LATENT, PIXELS_IN_LATENT, LATENTS_IN_PATCH = 4, 8, 2
# Random queries and keys give scores of a standard deviation of 1, over which a softmax is nearly flat: each token
# gets almost the mean value, whatever attention computes. At 4 few keys count, and a wrong result shows.
SCORE_SPREAD = 4.0
# The first step of a generation starts from the full map, whatever maps were set. The second is measured.
FIRST_TIMESTEP, SECOND_TIMESTEP = 900, 500


@dataclass(frozen=True)
class ModelSize:
    """A configuration of Wan 2.1's text-to-video model, of which `layers` layers are run."""

    name: str
    heads: int
    ffn_dim: int
    layers: int
    whole_layers: int
    head_dim: int = 128
    channels: int = 16
    text_dim: int = 4096
    text_tokens: int = 512
    freq_dim: int = 256

    def __str__(self) -> str:
        return self.name

    def facts(self) -> Row:
        """As the record holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Clip:
    """Size of a video in pixels."""

    name: str
    height: int
    width: int
    frames: int = FRAMES

    def __str__(self) -> str:
        return self.name

    @property
    def latents(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents."""
        frames = (self.frames - 1) // FRAMES_IN_LATENT + 1
        return frames, self.height // PIXELS_IN_LATENT, self.width // PIXELS_IN_LATENT

    @property
    def tokens(self) -> int:
        frames, height, width = self.latents
        return frames * (height // LATENTS_IN_PATCH) * (width // LATENTS_IN_PATCH)

    def facts(self) -> Row:
        """As the record holds it."""
        return {**asdict(self), "latents": list(self.latents), "tokens": self.tokens}


def random_model(size: ModelSize, device: str | None = None) -> Any:
    """A transformer in bf16, with what diffusers keeps in fp32 in fp32."""
    make: Any = WanTransformer3DModel
    with torch.device(device or DEVICE):
        model = make(
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            in_channels=size.channels,
            out_channels=size.channels,
            text_dim=size.text_dim,
            freq_dim=size.freq_dim,
            ffn_dim=size.ffn_dim,
            num_layers=size.layers,
        )
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(DTYPE)
    for block in model.blocks:
        block.attn1.norm_q.weight.fill_(SCORE_SPREAD)
    return model


class Step:
    """One forward pass at batch 1, on one of two draws of inputs; its layers are compiled one by one."""

    def __init__(self, size: ModelSize, clip: Clip) -> None:
        torch.compiler.reset()  # torch compiles one function only so many times, whatever it is that changed
        self.model = random_model(size)
        self.model.compile_repeated_blocks(**COMPILE)
        shape = (1, size.channels, *clip.latents)
        self.draws = torch.randn(2, *shape, device=DEVICE).to(DTYPE)
        self.latents = self.draws[0]
        self.text = torch.randn(1, size.text_tokens, size.text_dim, device=DEVICE).to(DTYPE)
        self.timestep = torch.tensor([SECOND_TIMESTEP], device=DEVICE)

    def load(self, draw: int) -> None:
        """Choose the latents."""
        self.latents = self.draws[draw]

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The model, compiled."""
        out: Tensor = self.model(latents, timestep, text, return_dict=False)[0]
        return out

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.latents, self.timestep, self.text

    def eager(self) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return self.forward(*self.inputs)

    def compiled(self) -> Tensor:
        return self.forward(*self.inputs)

    @contextlib.contextmanager
    def without_layers(self) -> Iterator[None]:
        """The step without its transformer blocks: embeddings, and what follows the last block."""
        blocks, self.model.blocks = self.model.blocks, nn.ModuleList()
        try:
            yield
        finally:
            self.model.blocks = blocks

    @contextlib.contextmanager
    def flash_attention_3(self) -> Iterator[None]:
        """Self-attention by FlashAttention-3."""
        layers = [block.attn1 for block in self.model.blocks]
        originals = [layer.processor for layer in layers]
        torch.compiler.reset()
        for layer in layers:
            layer.set_processor(_FlashAttention3Processor(layer.processor))
        try:
            yield
        finally:
            for layer, original in zip(layers, originals, strict=True):
                layer.set_processor(original)

    @contextlib.contextmanager
    def lite_attention(self) -> Iterator[list[LiteAttention]]:
        """Self-attention by ours, in the second step of a generation; the threshold drops nothing."""
        torch.compiler.reset()
        handle = enable_lite_attention(self.model, threshold=-math.inf, guidance="batched")
        try:
            for timestep in (FIRST_TIMESTEP, SECOND_TIMESTEP):
                self.timestep.fill_(timestep)
                self.eager()
            yield [layer for layer in handle.layers.values() if isinstance(layer, LiteAttention)]
        finally:
            handle.disable()


def captured(step: Step, layers: Sequence[LiteAttention]) -> Callable[[], Tensor]:
    """The compiled step as a CUDA graph."""
    step.compiled()  # makes whatever is made on first use
    if layers:
        replay = capture_step(step.forward, step.inputs, modules=step.model, warmup_calls=1)
        return lambda: replay(*step.inputs)
    inputs = tuple(tensor.clone() for tensor in step.inputs)
    replay_in_place = in_graph(lambda: step.forward(*inputs))

    def call() -> Tensor:
        for static, today in zip(inputs, step.inputs, strict=True):
            static.copy_(today)
        return replay_in_place()

    return call


@torch.library.custom_op("lite_attention_benchmarks::flash_attention_3", mutates_args=())
def _flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return peers.flash_attention_3()(q, k, v)()


@_flash_attention_3.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _flash_attention_3_for_sdpa(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
    out: Tensor = _flash_attention_3(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


class _FlashAttention3Processor:
    """A layer's own processor with its attention call sent to FlashAttention-3."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with route_sdpa(_flash_attention_3_for_sdpa):  # type: ignore[arg-type]  # the rest is None, False and 0
            return self.processor(*args, **kwargs)
