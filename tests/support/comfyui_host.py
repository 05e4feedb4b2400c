"""As much of ComfyUI as an attention override meets: a patcher, a sampler, and a model that calls attention its way.

Which options a model call is given, and when, follows comfy/samplers.py (inner_sample, predict_noise, calc_cond_batch);
what happens to an attention call follows comfy/ldm/modules/attention.py (wrap_attn).
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HEADS, HEAD_DIM = 2, 32
WIDTH = HEADS * HEAD_DIM
TEXT_TOKENS = 16


def overridable(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An attention function that hands its calls to the override in ``transformer_options``, if there is one."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        if "_inside_attn_wrapper" in kwargs:
            return function(*args, **kwargs)
        kwargs["_inside_attn_wrapper"] = True
        options = kwargs.get("transformer_options")
        if options is not None and "optimized_attention_override" in options:
            return options["optimized_attention_override"](function, *args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


@overridable
def optimized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Dense attention on ``[batch, tokens, heads * head_dim]``, or ``[batch, heads, tokens, head_dim]``."""
    if not skip_reshape:
        head_dim = q.shape[-1] // heads
        q, k, v = (tensor.unflatten(-1, (-1, head_dim)).transpose(1, 2) for tensor in (q, k, v))
    out = scaled_dot_product_attention(
        q, k, v, mask, scale=kwargs.get("scale"), enable_gqa=kwargs.get("enable_gqa", False)
    )
    return out if skip_output_reshape else out.transpose(1, 2).flatten(-2)


class Block(nn.Module):
    """Self-attention in which each token heeds those like it, and cross-attention to text."""

    def __init__(self) -> None:
        super().__init__()
        self.like, self.value, self.text = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        q = 4 * self.like(x)
        x = x + optimized_attention(q, q, self.value(x), heads=HEADS, transformer_options=transformer_options)
        text = self.text(context)
        return x + optimized_attention(x, text, text, heads=HEADS, transformer_options=transformer_options)


class VideoModel(nn.Module):
    """Says in ``transformer_options`` which block runs, as ComfyUI's Wan does."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        transformer_options["total_blocks"] = len(self.transformer_blocks)
        transformer_options["block_type"] = "double"
        for index, block in enumerate(self.transformer_blocks):
            transformer_options["block_index"] = index
            x = block(x, context, transformer_options)
        return x


class LTXVModel(VideoModel):
    """Does not say which block runs, but lets blocks be replaced, as ComfyUI's LTX-Video does."""

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        replacements = transformer_options.get("patches_replace", {}).get("dit", {})
        for index, block in enumerate(self.transformer_blocks):

            def run(args: dict[str, Any], block: nn.Module = block) -> dict[str, Tensor]:
                return {"img": block(args["img"], args["txt"], args["transformer_options"])}

            args = {"img": x, "txt": context, "transformer_options": transformer_options}
            replacement = replacements.get(("double_block", index))
            x = (replacement(args, {"original_block": run}) if replacement else run(args))["img"]
        return x


class ModelPatcher:
    """Shares the model between clones, not the options."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        self.diffusion_model = diffusion_model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}

    def clone(self) -> "ModelPatcher":
        other = ModelPatcher(self.diffusion_model)
        other.model_options = _copy_dicts(self.model_options)
        other.wrappers = _copy_dicts(self.wrappers)
        return other

    def get_model_object(self, name: str) -> Any:
        return getattr(self, name)

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None:
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    def set_model_patch_replace(self, patch: Callable[..., Any], name: str, block_name: str, number: int) -> None:
        options = self.model_options["transformer_options"]
        options.setdefault("patches_replace", {}).setdefault(name, {})[(block_name, number)] = patch

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """One model call, inside the wrappers that were added for it."""

        def run(
            x: Tensor,
            t: Tensor,
            c_concat: None,
            c_crossattn: Tensor,
            control: None,
            transformer_options: dict[str, Any],
        ) -> Tensor:
            return self.diffusion_model(x, c_crossattn, transformer_options.copy())

        return self.wrapped("apply_model", run)(x, t, None, c_crossattn, None, transformer_options)

    def wrapped(self, kind: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run`` inside the wrappers that were added for it."""
        for wrappers in self.wrappers.get(kind, {}).values():
            for wrapper in wrappers:
                run = functools.partial(wrapper, run)
        return run


@dataclass
class Condition:
    """A prompt. ComfyUI gives each a new uuid in each sampling."""

    context: Tensor
    uuid: UUID = field(default_factory=uuid4)


def prompts(*seeds: int) -> list[Condition]:
    """A prompt for each seed."""
    return [
        Condition(torch.randn(1, TEXT_TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))) for seed in seeds
    ]


def schedule(steps: int, first: float = 1.0) -> Tensor:
    """Sigmas down to 0, as ComfyUI's schedulers give them."""
    return torch.linspace(first, 0.0, steps + 1)


def calc_cond_batch(
    model: ModelPatcher,
    conds: list[list[Condition]],
    x: Tensor,
    sigma: Tensor,
    options: dict[str, Any],
    batched: bool,
) -> list[Tensor]:
    """The model's prediction for each side (positive, negative), averaged over the side's prompts."""
    to_run = [(index, condition) for index, side in enumerate(conds) for condition in side]
    to_run.reverse()  # ComfyUI begins with the last
    results: list[list[Tensor]] = [[] for _ in conds]
    for chunk in [to_run] if batched else [[entry] for entry in to_run]:
        transformer_options = _copy_dicts(options["transformer_options"])
        transformer_options["cond_or_uncond"] = [index for index, _ in chunk]
        transformer_options["uuids"] = [condition.uuid for _, condition in chunk]
        transformer_options["sigmas"] = sigma
        context = torch.cat([condition.context for _, condition in chunk]).to(x)
        call = {"input": torch.cat([x] * len(chunk)), "timestep": torch.cat([sigma] * len(chunk))}

        def apply(x: Tensor, t: Tensor, *, context: Tensor = context, options: Any = transformer_options) -> Tensor:
            return model.apply_model(x, t, context, options)

        out = options.get("model_function_wrapper", lambda apply, call: apply(call["input"], call["timestep"]))(
            apply, call
        )
        for (index, _), part in zip(chunk, out.chunk(len(chunk)), strict=True):
            results[index].append(part)
    return [torch.stack(parts).mean(0) for parts in results]


@torch.inference_mode()
def sample(
    model: ModelPatcher,
    conds: list[list[Condition]],
    sigmas: Tensor,
    tokens: int | slice = 512,
    batched: Callable[[int], bool] = lambda step: False,
    *,
    function: Callable[..., Tensor] | None = None,
    tells_of_samplings: bool = True,
    calls: Callable[[int], list[int]] = lambda step: [step],
    window: Callable[[int], object] | None = None,
) -> list[list[Tensor]]:
    """Call the model at ``sigmas``; for each call, the prediction for each side of ``conds``.

    The inputs do not depend on the predictions, so that samplings can be compared step by step.

    Args:
        tokens: of the video; a slice for a part of one of 512.
        batched: whether a step's conditions share a batch.
        function: runs ``apply(x, timestep)`` in place of ComfyUI, as nodes that cut the latent into tiles do.
        tells_of_samplings: older versions have no wrappers around a sampling and an evaluation.
        calls: for each step the numbers of the sigmas at which the sampler calls the model.
        window: the context window of a step.
    """
    run = functools.partial(_sample, model, conds, sigmas, tokens, batched, function, calls, window, tells_of_samplings)
    return (model.wrapped("outer_sample", run) if tells_of_samplings else run)()


def _sample(
    model: ModelPatcher,
    conds: list[list[Condition]],
    sigmas: Tensor,
    tokens: int | slice,
    batched: Callable[[int], bool],
    function: Callable[..., Tensor] | None,
    calls: Callable[[int], list[int]],
    window: Callable[[int], object] | None,
    tells_of_evaluations: bool,
) -> list[list[Tensor]]:
    options = _copy_dicts(model.model_options)
    options["transformer_options"]["sample_sigmas"] = sigmas
    if function is not None:
        options["model_function_wrapper"] = function
    weight = next(model.diffusion_model.parameters())
    length, part = (512, tokens) if isinstance(tokens, slice) else (tokens, slice(None))
    both = torch.randn(2, 1, length, WIDTH, generator=torch.Generator().manual_seed(0))
    video, noise = both[:, :, part].to(weight)
    predictions = []
    for step in range(len(sigmas) - 1):
        if window is not None:
            options["transformer_options"]["context_window"] = window(step)
        for number, index in enumerate(calls(step)):
            x = video + 0.1 * (index + 0.1 * number) * noise
            sigma = sigmas[index] * torch.ones(1, device=x.device)
            evaluate = model.wrapped("predict_noise", calc_cond_batch) if tells_of_evaluations else calc_cond_batch
            predictions.append(evaluate(model, conds, x, sigma, options, batched(step)))
    return predictions


def _copy_dicts(nested: dict[Any, Any]) -> dict[Any, Any]:
    """Copies of the dicts and lists, and of nothing in them."""
    return {
        key: _copy_dicts(value) if isinstance(value, dict) else copy.copy(value) if isinstance(value, list) else value
        for key, value in nested.items()
    }
