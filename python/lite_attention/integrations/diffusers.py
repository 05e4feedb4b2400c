"""LiteAttention in the video transformers and pipelines of Hugging Face diffusers.

:func:`enable_lite_attention` gives every video self-attention layer a processor that runs the layer's own processor and
takes over the one attention call in it. Projections, norms and rotary embeddings stay diffusers' code, so what works
with the stock processor (LoRA, fused projections, quantised weights) works here too.

What is not video-to-video is never skipped: cross-attention layers keep their processors, and in layers that attend
over text and video together every tile with a text key or a text query is kept.

On many GPUs diffusers' context parallelism splits the tokens where the model begins and puts them together where it
ends, and layers that are left alone exchange theirs in diffusers' way. A layer with LiteAttention makes the attention
call of a single process, with this rank's tokens, and :class:`lite_attention.DistributedLiteAttention` takes it over.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import get_process_group_ranks, get_rank

from lite_attention.integrations._routing import as_autocast, reason_to_refuse, route_sdpa
from lite_attention.maps.keep_map import parse_ranges
from lite_attention.parallel.distributed import DistributedLiteAttention
from lite_attention.parallel.mesh import sequence_mesh
from lite_attention.skipping.arguments import Ranges, Threshold
from lite_attention.skipping.branches import MAX_BRANCHES, resolved_branch, skip_branch
from lite_attention.skipping.generation import GenerationClock
from lite_attention.skipping.module import LiteAttention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["LiteAttentionHandle", "VideoModel", "enable_lite_attention", "register_video_model"]

# Ranges that set_must_do may hold, so that changing them changes no shape.
MAX_MUST_DO_RANGES = 16
# Steps of a generation whose skip fraction is remembered; later ones are left out.
RECORDED_STEPS = 128
# Fractions are kept as integers, which nn.Module.to does not cast.
FRACTION_UNIT = 1_000_000
NOT_RECORDED = -1
# Batches are as large as the pipeline makes them; the module's own limit is for callers that know theirs.
ANY_BATCH = 2**31
# The name under which a transformer registers what its layers share.
GENERATION = "lite_attention_generation"


@dataclass(frozen=True)
class VideoModel:
    """Where a transformer class keeps its video self-attention, and what else attends there.

    Args:
        layers: regular expressions that match the whole name of each such attention module.
        text: whether text tokens stand before or after the video tokens in these layers, or are not there.
        prefix_mask: the layers are given a mask ``[batch, 1, 1, tokens]`` that is True for the first so many tokens of
            each batch entry and False for the padding after them. Other masks are refused.
        may_bypass: some calls leave attention out (spatio-temporal guidance); the layer's next pass starts full.
        token_split: whether tokens can be split among ranks. "mesh only": by ``mesh``, not by diffusers' own plan,
            which splits the text too; "none": diffusers' plan does not work.
        text_layers: like ``layers``, the attention modules in which video attends to text and to nothing else. Where
            ``mesh`` makes diffusers split tokens among ranks, these layers get the whole text on every rank.
    """

    layers: tuple[str, ...]
    text: Literal["none", "first", "last"] = "none"
    prefix_mask: bool = False
    may_bypass: bool = False
    token_split: Literal["any", "mesh only", "none"] = "any"
    text_layers: tuple[str, ...] = ()


_VIDEO_MODELS = {
    "CogVideoXTransformer3DModel": VideoModel((r"transformer_blocks\.\d+\.attn1",), text="first"),
    "HunyuanVideoTransformer3DModel": VideoModel(
        (r"transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn"), text="last", prefix_mask=True
    ),
    "LTXVideoTransformer3DModel": VideoModel(
        (r"transformer_blocks\.\d+\.attn1",), token_split="mesh only", text_layers=(r"transformer_blocks\.\d+\.attn2",)
    ),
    "LTX2VideoTransformer3DModel": VideoModel(
        (r"transformer_blocks\.\d+\.attn1",), may_bypass=True, token_split="none"
    ),
    "WanTransformer3DModel": VideoModel((r"blocks\.\d+\.attn1",), text_layers=(r"blocks\.\d+\.attn2",)),
    "WanVACETransformer3DModel": VideoModel((r"blocks\.\d+\.attn1", r"vace_blocks\.\d+\.attn1")),
}


def register_video_model(class_name: str, model: VideoModel) -> None:
    """Say how :func:`enable_lite_attention` is to treat transformers of another class.

    Check that the model's output is unchanged at a threshold of -inf before relying on it.

    Args:
        class_name: name of the transformer's class; subclasses are treated likewise.
        model: where its video self-attention is. Its attention processors must call diffusers' dispatcher or torch's
            scaled_dot_product_attention once.
    """
    _VIDEO_MODELS[class_name] = model


class _Generation(nn.Module):
    """What the layers of one transformer share: the time and the ranges that must be computed."""

    must_do: Tensor | None

    def __init__(self, skip_first_steps: int) -> None:
        super().__init__()
        self.clock = GenerationClock(skip_first_steps)
        self.register_buffer("must_do", None, persistent=False)

    def set_must_do(self, ranges: list[tuple[int, int]]) -> bool:
        """Take over the ranges, and say whether that made a new buffer."""
        is_new = self.must_do is None and len(ranges) > 0
        if is_new:
            with torch.inference_mode(False):  # an inference tensor could not be written outside that mode
                empty = torch.zeros(MAX_MUST_DO_RANGES, 2, dtype=torch.int64, device=self.clock.start_full.device)
            self.register_buffer("must_do", empty, persistent=False)
        if self.must_do is not None:
            rows = [*ranges, *[(0, 0)] * (MAX_MUST_DO_RANGES - len(ranges))]
            self.must_do.copy_(torch.tensor(rows))
        return is_new

    def tick(self, timestep: Tensor) -> None:
        if isinstance(timestep, Tensor) and self.clock.start_full.device != timestep.device:
            with torch.inference_mode(False):
                self.to(timestep.device)  # offloading moves the transformer only once its forward begins
        self.clock.tick(timestep)


class LiteAttentionProcessor(nn.Module):
    """Runs a layer's own processor, with LiteAttention in place of its attention call."""

    generation: _Generation
    _history: Tensor
    # Written by diffusers where it sets up context parallelism while this processor is in place.
    _parallel_config: object | None = None

    def __init__(
        self,
        name: str,
        processor: Callable[..., Any],
        model: VideoModel,
        generation: _Generation,
        threshold: Threshold,
        mesh: DeviceMesh | None,
    ) -> None:
        super().__init__()
        self.name = name
        # On a copy, so that the original is what it was when it comes back: whatever backend is chosen for the rest of
        # the model, this layer's call must reach torch's function to be taken over.
        self.processor = copy.copy(processor)
        if hasattr(processor, "_attention_backend"):
            self.processor._attention_backend = _native_backend()  # type: ignore[attr-defined]
        if hasattr(processor, "_parallel_config"):
            self.processor._parallel_config = None  # type: ignore[attr-defined]
        self.model = model
        # Not as a submodule: the transformer registers it, once, as torch.export wants it.
        vars(self)["generation"] = generation
        self.attention: LiteAttention | DistributedLiteAttention
        if mesh is None:
            self.attention = LiteAttention(threshold=threshold, max_batch_size=ANY_BATCH)
        else:
            self.attention = DistributedLiteAttention(mesh, threshold=threshold, max_batch_size=ANY_BATCH)
        self._masks_fit = model.prefix_mask and not _splits_tokens(mesh)
        with torch.inference_mode(False):
            history = torch.full((MAX_BRANCHES, RECORDED_STEPS), NOT_RECORDED, dtype=torch.int32)
            self.register_buffer("_history", history, persistent=False)

    def attend(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """What the layer calls, with the arguments of its own processor."""
        if self._parallel_config is not None:
            raise RuntimeError(
                f"{self.name}: context parallelism was enabled after LiteAttention, expected before it. Call disable() "
                "on the handle, then enable_lite_attention again"
            )
        calls: list[int] = []
        handler = functools.partial(self._attention, 0, calls)
        if self.model.text != "none" and encoder_hidden_states is not None:
            handler = functools.partial(self._attention, encoder_hidden_states.shape[1], calls)
        with route_sdpa(handler):
            out = self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        if self.model.may_bypass and len(calls) == 0:
            self.attention.reset_skip_state(resolved_branch(None, "LiteAttentionProcessor"))  # it may miss a start
        elif len(calls) != 1:
            raise RuntimeError(
                f"{self.name}: {type(self.processor).__name__} called scaled_dot_product_attention {len(calls)} times, "
                "expected once"
            )
        return out

    def _attention(
        self,
        text_len: int,
        calls: list[int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        calls.append(text_len)
        query, key, value = as_autocast(query, key, value)
        refused = reason_to_refuse(query, key, dropout_p, is_causal)
        if refused is not None:
            raise ValueError(f"{self.name}: {refused}")
        batch, _, tokens, _ = query.shape
        kv_lens = None
        if attn_mask is not None:
            fits = attn_mask.dtype == torch.bool and attn_mask.shape == (batch, 1, 1, tokens)
            if not (self._masks_fit and fits):
                expected = f"torch.bool and {[batch, 1, 1, tokens]}" if self._masks_fit else "no mask"
                raise ValueError(
                    f"{self.name}: attn_mask has dtype {attn_mask.dtype} and shape {list(attn_mask.shape)}, expected "
                    f"{expected}"
                )
            kv_lens = attn_mask.view(batch, tokens).sum(-1, dtype=torch.int32)
        must_do, must_do_queries = self._must_do(tokens, text_len)
        fraction = torch.zeros((), device=query.device)
        out: Tensor = self.attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale,
            must_do_list=must_do,
            must_do_queries=must_do_queries,
            kv_lens=kv_lens,
            start_full=self.generation.clock.start_full.to(query.device),
            skip_fraction_out=fraction,
        )
        self._record(fraction)
        return out.transpose(1, 2)

    def _must_do(self, tokens: int, text_len: int) -> tuple[Ranges | None, Ranges | None]:
        """Ranges of keys and of queries that are always computed: the text's, and what the user asks for."""
        ranges = self.generation.must_do
        if text_len == 0:
            return ranges, None
        first = 0 if self.model.text == "first" else tokens - text_len
        text = [first, first + text_len]
        if ranges is None:
            return text, text
        video_start = text_len if self.model.text == "first" else 0
        # Filled, not copied from the host, which a CUDA graph could not capture.
        text_row = torch.cat([ranges.new_full((1, 1), text[0]), ranges.new_full((1, 1), text[1])], 1)
        return torch.cat([ranges + video_start, text_row]), text

    def _record(self, fraction: Tensor) -> None:
        branch = resolved_branch(None, "LiteAttentionProcessor")
        row = self._history[branch]
        step = self.generation.clock.step(branch).to(row.device)
        steps = torch.arange(RECORDED_STEPS, device=row.device)
        value = (fraction * FRACTION_UNIT).round().to(row.dtype)
        row.copy_(torch.where(steps == step, value, torch.where(step == 0, NOT_RECORDED, row)))

    def skip_fractions(self, branch: int) -> Tensor:
        """Share of tiles skipped in each step of the generation: fp32 ``[steps]``, NaN where not recorded."""
        steps = int(self.generation.clock.step(branch)) + 1
        row = self._history[branch, : max(0, min(steps, RECORDED_STEPS))].cpu()
        return torch.where(row == NOT_RECORDED, torch.nan, row / FRACTION_UNIT)


@functools.cache
def _processor_class(processor_class: Any) -> type[LiteAttentionProcessor]:
    """A class whose call has the signature of ``processor_class``: diffusers drops arguments that are not in it.

    One for each class and not one for each layer, so that one compiled block serves all.
    """

    def call(
        self: LiteAttentionProcessor,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return self.attend(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    call.__signature__ = inspect.signature(processor_class.__call__)  # type: ignore[attr-defined]
    return type(f"Lite{processor_class.__name__}", (LiteAttentionProcessor,), {"__call__": call})


def _native_backend() -> object:
    # Not imported at the top, so that the names of this module can be read without diffusers.
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName.NATIVE


class _BranchNames:
    """Numbers of the guidance branches that a pipeline names."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        if name not in self._numbers:
            if len(self._numbers) == MAX_BRANCHES:
                raise RuntimeError(
                    f"cache_context({name!r}): one guidance branch too many, expected at most {MAX_BRANCHES}: "
                    f"{', '.join(self._numbers)}"
                )
            self._numbers[name] = len(self._numbers)
        return self._numbers[name]

    def known_number(self, name: str) -> int:
        if name not in self._numbers:
            known = ", ".join(map(repr, self._numbers)) or "none so far"
            raise ValueError(f"branch is {name!r}, expected a name that cache_context was given: {known}")
        return self._numbers[name]


class _Replaced:
    """Methods put on an object, and how to take them off again."""

    def __init__(self, owner: object, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._owner, self._methods = owner, methods
        self._before = {name: vars(owner).get(name) for name in methods}
        vars(owner).update(methods)

    def restore(self) -> None:
        present = vars(self._owner)
        for name, method in self._methods.items():
            if present.get(name) is not method:
                continue  # replaced or wrapped by someone else since then, whose it is now
            if self._before[name] is None:
                del present[name]
            else:
                present[name] = self._before[name]


class _Resetting:
    """``scheduler.set_timesteps``, which a pipeline calls where a generation starts, with what is to be done then."""

    def __init__(self, set_timesteps: Callable[..., Any], start_generation: Callable[[], None]) -> None:
        self._set_timesteps, self._start_generation = set_timesteps, start_generation
        functools.update_wrapper(self, set_timesteps)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._start_generation()
        return self._set_timesteps(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A pipeline's copy of its scheduler, for the sound of a video, has its own timesteps and starts no generation.
        return copy.deepcopy(self._set_timesteps, memo)


class _PatchedTransformer:
    """One transformer with LiteAttention in its layers, and how to take it out again.

    What is put on the transformer are partial functions of its own bound methods: a deep copy of it gets its own.
    """

    def __init__(
        self,
        transformer: nn.Module,
        branches: _BranchNames,
        threshold: Threshold,
        skip_first_steps: int,
        layers: Sequence[int] | None,
        mesh: DeviceMesh | None,
    ) -> None:
        model = _video_model(transformer)
        if hasattr(transformer, GENERATION):
            raise ValueError(
                f"enable_lite_attention: LiteAttention is in this {type(transformer).__name__} already, expected one "
                "handle: disable() it first"
            )
        chosen = _chosen_layers(_layer_names(transformer, model), layers, type(transformer).__name__)
        timestep_position = _position_of_timestep(transformer)
        _refuse_group_offloading(transformer)
        is_split = _parallel_mesh(transformer) is not None
        if _splits_tokens(mesh):
            _check_splittable(transformer, model, is_split)
        self.transformer = transformer
        self.generation = _Generation(skip_first_steps)
        self.generation.to(next(transformer.parameters()).device)
        self.processors: dict[str, LiteAttentionProcessor] = {}
        self._originals: dict[str, Callable[..., Any]] = {}
        for name in chosen:
            original = self._layer(name).processor
            _check_processor(name, original, transformer)
            self._originals[name] = original
            wrapped = _processor_class(type(original))(  # type: ignore[arg-type]
                name, original, model, self.generation, threshold, mesh
            )
            self.processors[name] = wrapped.to(self.generation.clock.start_full.device)
        to_enable = mesh if _splits_tokens(mesh) and not is_split else None
        if to_enable is not None:
            _enable_context_parallelism(transformer, model, to_enable)
        self._enabled_parallelism = to_enable is not None
        _look_signatures_up(transformer)
        transformer.add_module(GENERATION, self.generation)
        for name, processor in self.processors.items():
            self._layer(name).set_processor(processor)
        self._timestep_position = timestep_position
        self._forwards: list[_Replaced] = []
        self._cache_context: _Replaced | None = None
        self.keep_ticking()
        if hasattr(transformer, "cache_context"):
            cache_context: Any = transformer.cache_context
            in_branch = functools.partial(_in_branch, cache_context, branches, self.keep_ticking)
            methods = {"cache_context": functools.update_wrapper(in_branch, cache_context)}
            self._cache_context = _Replaced(transformer, methods)

    def keep_ticking(self) -> None:
        """Make the transformer's forward tell the time, where it does not: hooks that are removed take it away."""
        # accelerate's hooks call, and put back when they go, what they keep under this name.
        name = "_old_forward" if "_old_forward" in vars(self.transformer) else "forward"
        forward: Any = getattr(self.transformer, name)
        inner = forward
        while inner is not None:
            if self._is_ticking(inner):
                return
            inner = getattr(inner, "__wrapped__", None)
        ticking = functools.partial(_ticking, forward, self.generation, self._timestep_position)
        self._forwards.append(_Replaced(self.transformer, {name: functools.update_wrapper(ticking, forward)}))

    def restore(self) -> None:
        delattr(self.transformer, GENERATION)
        for name, original in self._originals.items():
            if self._layer(name).processor is self.processors[name]:
                self._layer(name).set_processor(original)
                later = self.processors[name]._parallel_config  # context parallelism that was enabled since then
                if later is not None and hasattr(original, "_parallel_config"):
                    original._parallel_config = later
        for replaced in (*reversed(self._forwards), self._cache_context):
            if replaced is not None:
                replaced.restore()
        present = vars(self.transformer)
        if self._is_ticking(present.get("forward")):  # put there by a hook that went
            present["forward"] = present["forward"].args[0]
        if self._enabled_parallelism:
            _disable_context_parallelism(self.transformer)

    def _is_ticking(self, forward: object) -> bool:
        is_partial = isinstance(forward, functools.partial) and forward.func is _ticking
        return is_partial and forward.args[1] is self.generation  # type: ignore[attr-defined]

    def _layer(self, name: str) -> Any:
        return self.transformer.get_submodule(name)


def _refuse_group_offloading(transformer: nn.Module) -> None:
    for name, module in transformer.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if any("group_offloading" in hook for hook in hooks):
            raise RuntimeError(
                f"enable_lite_attention: {name or type(transformer).__name__} is set up for group offloading, which "
                "loses the skip state on the way, expected a transformer that stays, or is offloaded as a whole"
            )


def _common_mesh(transformers: dict[str, nn.Module], mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The mesh for all layers: the one that diffusers splits the tokens over, else the one that was given."""
    if mesh is not None:
        sequence_mesh(mesh, "enable_lite_attention")
    meshes = {prefix: _parallel_mesh(transformer) for prefix, transformer in transformers.items()}
    split = {prefix: found for prefix, found in meshes.items() if found is not None}
    if not split:
        return mesh
    if len(split) < len(meshes):
        missing = next(prefix for prefix in meshes if prefix not in split)
        raise RuntimeError(
            f"enable_lite_attention: context parallelism is enabled on {next(iter(split)).rstrip('.')} and not on "
            f"{missing.rstrip('.')}, expected both or neither"
        )
    first, *others = split.values()
    for other in others:
        if _ranks(other) != _ranks(first):
            raise ValueError(
                f"enable_lite_attention: context parallelism of one transformer has {_described(first)}, of the other "
                f"{_described(other)}, expected the same mesh for both"
            )
    if mesh is not None and _ranks(mesh) != _ranks(first):
        raise ValueError(
            f"enable_lite_attention: mesh has {_described(mesh)}, expected {_described(first)} as the context "
            "parallelism that is enabled already, or mesh=None"
        )
    return first


def _parallel_mesh(transformer: nn.Module) -> DeviceMesh | None:
    """The ranks over which diffusers splits the transformer's tokens, or None."""
    context = getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)
    if context is None:
        return None
    for option in ("ulysses_anything", "ring_anything"):
        if getattr(context, option, False):
            raise ValueError(
                f"enable_lite_attention: context parallelism has {option}=True, which makes shards of unequal length, "
                "expected False and a number of tokens that the ranks divide"
            )
    mesh: DeviceMesh = context._mesh
    return mesh if set(mesh.mesh_dim_names or ()) == {"ring", "ulysses"} else mesh["ring", "ulysses"]


def _ranks(mesh: DeviceMesh) -> tuple[list[int], list[int]]:
    """The ranks that this one shares a ring with, and those that it exchanges heads with."""
    names = mesh.mesh_dim_names or ()
    ring, ulysses = (
        get_process_group_ranks(mesh.get_group(name)) if name in names else [get_rank()] for name in ("ring", "ulysses")
    )
    return ring, ulysses


def _described(mesh: DeviceMesh) -> str:
    ring, ulysses = _ranks(mesh)
    return f"the ranks {ring} in a ring and {ulysses} for Ulysses"


def _splits_tokens(mesh: DeviceMesh | None) -> bool:
    return mesh is not None and mesh.size() > 1


def _check_splittable(transformer: nn.Module, model: VideoModel, is_split: bool) -> None:
    class_name = type(transformer).__name__
    if model.text != "none":
        raise ValueError(
            f"enable_lite_attention: layers of {class_name} attend over text and video together, expected a model with "
            "video alone in its self-attention where tokens are split among ranks"
        )
    if model.token_split == "none":
        raise ValueError(
            f"enable_lite_attention: diffusers' plan of how to split the tokens of {class_name} does not work, "
            "expected no mesh and no context parallelism"
        )
    if model.token_split == "mesh only" and is_split:
        raise ValueError(
            f"enable_lite_attention: context parallelism is enabled on {class_name}, by a plan that splits the text "
            "too, expected mesh= instead"
        )
    if not is_split and getattr(transformer, "_cp_plan", None) is None:
        raise ValueError(
            f"enable_lite_attention: {class_name} does not say how its tokens can be split (_cp_plan is None), "
            "expected mesh=None, or a transformer on which enable_parallelism was called with a cp_plan"
        )
    if not is_split and getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            f"enable_lite_attention: {class_name} is set up for tensor parallelism, expected mesh=None with it"
        )


def _enable_context_parallelism(transformer: Any, model: VideoModel, mesh: DeviceMesh) -> None:
    from diffusers import ContextParallelConfig

    if "mesh" not in inspect.signature(ContextParallelConfig).parameters:
        raise RuntimeError(
            "enable_lite_attention: mesh needs diffusers 0.38 or newer. With an older one, call "
            "transformer.enable_parallelism before and leave mesh=None"
        )
    names = mesh.mesh_dim_names or ()
    if set(names) != {"ring", "ulysses"}:
        raise ValueError(
            f"enable_lite_attention: mesh has the dimension {', '.join(names)} alone, expected ring and ulysses, of "
            "size 1 where it is not used: diffusers wants both"
        )
    ring, ulysses = (mesh.size(names.index(name)) for name in ("ring", "ulysses"))
    config = ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, mesh=mesh)  # type: ignore[no-untyped-call]
    plan = transformer._cp_plan
    if model.text_layers:
        plan = {module: _without_text(split) for module, split in plan.items()}
    try:
        transformer.enable_parallelism(config=config, cp_plan=plan)
    except Exception:
        _disable_context_parallelism(transformer)  # it may have begun
        raise
    # With the whole text at hand there is nothing to exchange. Diffusers' own way of splitting it takes no masks under
    # Ulysses, and in a ring only some attention backends.
    for name, module in transformer.named_modules():
        if _matches(name, model.text_layers) and hasattr(module, "set_processor"):
            module.processor._parallel_config = None


def _without_text(split: Any) -> Any:
    """An entry of diffusers' plan of what to split, but for the inputs that are text."""
    if not isinstance(split, dict):
        return split
    return {name: how for name, how in split.items() if not str(name).startswith("encoder_")}


def _look_signatures_up(transformer: nn.Module) -> None:
    """What diffusers' hooks that split tokens do in their first call, where torch.compile could not trace it."""
    for module in transformer.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            known = getattr(hook, "module_forward_metadata", None)
            if known is not None and known.cached_parameter_indices is None:
                _, *parameters = inspect.signature(known._cls.forward).parameters
                known.cached_parameter_indices = {name: index for index, name in enumerate(parameters)}


def _disable_context_parallelism(transformer: Any) -> None:
    """What diffusers has no call for: take its hooks out and tell the layers."""
    from diffusers.hooks.context_parallel import remove_context_parallel

    remove_context_parallel(transformer, transformer._cp_plan)
    config = vars(transformer).pop("_parallel_config", None)
    for module in transformer.modules():
        processor: Any = getattr(module, "processor", None)
        if config is not None and getattr(processor, "_parallel_config", None) is config:
            processor._parallel_config = None


def _position_of_timestep(transformer: nn.Module) -> int:
    # The class's own: hooks of older versions of diffusers hide the signature of what they wrap.
    _, *parameters = inspect.signature(type(transformer).forward).parameters
    if "timestep" not in parameters:
        raise ValueError(
            f"enable_lite_attention: {type(transformer).__name__}.forward has the parameters {', '.join(parameters)}, "
            "expected timestep among them"
        )
    return parameters.index("timestep")


def _ticking(
    forward: Callable[..., Any], generation: _Generation, timestep_position: int, *args: Any, **kwargs: Any
) -> Any:
    """A transformer's forward. Part of it and not a hook before it, so that one graph holds both."""
    generation.tick(args[timestep_position] if len(args) > timestep_position else kwargs["timestep"])
    return forward(*args, **kwargs)


@contextmanager
def _in_branch(
    cache_context: Callable[..., AbstractContextManager[None]],
    branches: _BranchNames,
    keep_ticking: Callable[[], None],
    name: str,
    **kwargs: Any,
) -> Iterator[None]:
    """A transformer's cache_context, in which pipelines call each guidance branch: it chooses the skip state too."""
    keep_ticking()
    with skip_branch(branches.number(name)), cache_context(name, **kwargs):
        yield


class LiteAttentionHandle:
    """What :func:`enable_lite_attention` returns: settings, state and figures of all layers, and the way back."""

    layers: dict[str, LiteAttention | DistributedLiteAttention]
    """The attention of each layer, by the name of its module (in a pipeline: component name, dot, module name)."""

    def __init__(
        self,
        transformers: dict[str, nn.Module],
        scheduler: object | None,
        threshold: Threshold,
        skip_first_steps: int,
        must_do: Sequence[int] | None,
        layers: Sequence[int] | None,
        mesh: DeviceMesh | None,
    ) -> None:
        mesh = _common_mesh(transformers, mesh)
        self._branches = _BranchNames()
        self._patched: list[_PatchedTransformer] = []
        self.layers = {}
        self._processors: dict[str, LiteAttentionProcessor] = {}
        try:
            for prefix, transformer in transformers.items():
                # The first steps of a generation are the first transformer's, where there are two for its two phases.
                steps = skip_first_steps if not self._patched else 0
                patched = _PatchedTransformer(transformer, self._branches, threshold, steps, layers, mesh)
                self._patched.append(patched)
                for name, processor in patched.processors.items():
                    self.layers[f"{prefix}{name}"] = processor.attention
                    self._processors[f"{prefix}{name}"] = processor
            self.set_must_do(must_do)
        except Exception:
            self._restore_transformers()
            raise
        self._scheduler = None if scheduler is None else _Replaced(scheduler, self._resetting(scheduler))

    def _resetting(self, scheduler: Any) -> dict[str, Callable[..., Any]]:
        return {"set_timesteps": _Resetting(scheduler.set_timesteps, self._start_generation)}

    def _start_generation(self) -> None:
        for patched in self._patched:
            patched.keep_ticking()
        self.reset()

    def reset(self) -> None:
        """Start a new generation: the next call of every branch computes every tile.

        Needed only where nothing else tells: see the page on diffusers. Never recompiles.
        """
        for patched in self._patched:
            patched.generation.clock.reset()

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold of every layer; see :meth:`lite_attention.LiteAttention.set_threshold`."""
        for layer in self.layers.values():
            layer.set_threshold(threshold)

    def set_must_do(self, ranges: Sequence[int] | None) -> None:
        """Choose video tokens whose keys every query attends to, whatever the maps say.

        Args:
            ranges: flat list ``[start, end, ...]`` of positions among the video tokens, end exclusive, at most
                ``MAX_MUST_DO_RANGES`` pairs; None or [] for no tokens. Positions past the last token are cut off.

        Changes of the ranges never recompile; the first ones given do, once.

        Raises:
            TypeError, ValueError: the list is not of that form.
        """
        pairs = _checked_pairs(ranges)
        for patched in self._patched:
            if patched.generation.set_must_do(pairs):
                for module in patched.transformer.modules():
                    if isinstance(module, LiteAttention):
                        module.outdate_captured_graphs()

    def skip_fraction(self, branch: str | int = 0) -> Tensor:
        """Share of the tiles that each layer skipped in each step of its latest generation. Waits for the device.

        Args:
            branch: name given to ``cache_context`` ("cond", "uncond", ...), or number of the branch.

        Returns:
            fp32 ``[layers, steps]`` on the CPU, layers in the order of :attr:`layers`; NaN where a layer did not run.
            At most ``RECORDED_STEPS`` steps. On many GPUs: of this rank's share of the work.

        Raises:
            TypeError, ValueError: no such branch, or none of that name has run.
        """
        number = self._branches.known_number(branch) if isinstance(branch, str) else branch
        index = resolved_branch(number, "skip_fraction")
        rows = [processor.skip_fractions(index) for processor in self._processors.values()]
        table = torch.full((len(rows), max(map(len, rows))), torch.nan)
        for row, fractions in zip(table, rows, strict=True):
            row[: len(fractions)] = fractions
        return table

    def disable(self) -> None:
        """Give the layers their own processors back and forget the state. The handle is of no use afterwards."""
        self._restore_transformers()
        if self._scheduler is not None:
            self._scheduler.restore()

    def _restore_transformers(self) -> None:
        for patched in self._patched:
            patched.restore()
        self._patched.clear()


def enable_lite_attention(
    transformer_or_pipeline: Any,
    threshold: Threshold = -10.0,
    skip_first_steps: int = 0,
    must_do: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    mesh: DeviceMesh | None = None,
) -> LiteAttentionHandle:
    """Let the video self-attention of a diffusers model skip what earlier denoising steps found negligible.

    Guidance branches are kept apart, whether they are batched or run one after the other inside
    ``transformer.cache_context``, as pipelines run them. A new generation is noticed by its timesteps, in a pipeline
    also by ``scheduler.set_timesteps``.

    Args:
        transformer_or_pipeline: a transformer of a class that diffusers or :func:`register_video_model` brings, or a
            pipeline with one or two of them (``transformer``, ``transformer_2``) that names its guidance branches by
            ``cache_context``. May be compiled.
        threshold: in powers of two, at most 0, one number or one per head: see :class:`lite_attention.LiteAttention`.
        skip_first_steps: compute every tile in so many steps at the start of a generation (of the first transformer).
        must_do: as for :meth:`LiteAttentionHandle.set_must_do`.
        layers: numbers of the self-attention layers that skip, in the order of the model, negative ones from its end;
            None for all. The others are left as they are.
        mesh: the ranks that make one video together, a DeviceMesh with the dimensions "ring" and "ulysses", of size 1
            where not used. Diffusers' context parallelism over it is enabled, until
            :meth:`LiteAttentionHandle.disable`, or was before. None takes the mesh of the context parallelism that was
            enabled before, if any.

    Returns:
        A handle to change settings, read what was skipped, and go back.

    Raises:
        TypeError: no transformer of a known class, or an argument is of another type.
        ValueError: an argument is not what it should be, LiteAttention is in the model already, or the tokens of this
            model cannot be split.
        RuntimeError: the model is set up for group offloading, or one of two transformers for context parallelism.
    """
    transformers = _transformers_of(transformer_or_pipeline)
    _refuse_guidance_without_names(transformer_or_pipeline, transformers)
    is_pipeline = not isinstance(transformer_or_pipeline, nn.Module)
    scheduler = getattr(transformer_or_pipeline, "scheduler", None) if is_pipeline else None
    return LiteAttentionHandle(transformers, scheduler, threshold, skip_first_steps, must_do, layers, mesh)


def _transformers_of(model: Any) -> dict[str, nn.Module]:
    """The transformers to change, by the prefix that their layers' names get."""
    if isinstance(model, nn.Module):
        return {"": _uncompiled(model)}
    found = {
        f"{name}.": _uncompiled(component)
        for name in ("transformer", "transformer_2")
        if isinstance(component := getattr(model, name, None), nn.Module)
    }
    if not found:
        raise TypeError(
            f"enable_lite_attention: transformer_or_pipeline is a {type(model).__name__}, expected a video transformer "
            "or a pipeline that has one as its component transformer"
        )
    return found


def _refuse_guidance_without_names(pipeline: Any, transformers: dict[str, nn.Module]) -> None:
    """Some pipelines run their guidance branches in turn and do not say which is which."""
    if isinstance(pipeline, nn.Module) or not all(hasattr(one, "cache_context") for one in transformers.values()):
        return
    try:
        source = inspect.getsource(type(pipeline).__call__)
    except (OSError, TypeError):  # made at run time
        return
    if "cache_context" not in source:
        raise ValueError(
            f"enable_lite_attention: {type(pipeline).__name__} does not name its guidance branches (cache_context), "
            "expected a pipeline that does. If it calls the transformer once a step, pass its transformer instead"
        )


def _uncompiled(module: nn.Module) -> nn.Module:
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, nn.Module) else module


def _video_model(transformer: nn.Module) -> VideoModel:
    for base in type(transformer).__mro__:
        if base.__name__ in _VIDEO_MODELS:
            return _VIDEO_MODELS[base.__name__]
    raise TypeError(
        f"enable_lite_attention: the transformer is a {type(transformer).__name__}, expected one of "
        f"{', '.join(sorted(_VIDEO_MODELS))}; register_video_model adds others"
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _layer_names(transformer: nn.Module, model: VideoModel) -> list[str]:
    names = [
        name
        for name, module in transformer.named_modules()
        if _matches(name, model.layers) and hasattr(module, "set_processor")
    ]
    if not names:
        raise ValueError(
            f"enable_lite_attention: {type(transformer).__name__} has no attention module whose name matches "
            f"{' or '.join(model.layers)}"
        )
    return names


def _chosen_layers(names: list[str], layers: Sequence[int] | None, class_name: str) -> list[str]:
    if layers is None:
        return names
    for index, layer in enumerate(layers):
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers[{index}] is {layer!r} of type {type(layer).__name__}, expected an int")
        if not -len(names) <= layer < len(names):
            raise ValueError(
                f"layers[{index}] is {layer}, expected {-len(names)} to {len(names) - 1}: {class_name} has "
                f"{len(names)} self-attention layers"
            )
    chosen = {names[layer] for layer in layers}
    if not chosen:
        raise ValueError("layers is empty, expected at least one layer, or None for all")
    return [name for name in names if name in chosen]


def _check_processor(name: str, processor: object, transformer: nn.Module) -> None:
    config = getattr(processor, "_parallel_config", None)
    if config is not None and config is not getattr(transformer, "_parallel_config", None):
        raise RuntimeError(
            f"{name}: its processor is set up for context parallelism and the transformer is not, expected both, by "
            "transformer.enable_parallelism"
        )


def _checked_pairs(ranges: Sequence[int] | None) -> list[tuple[int, int]]:
    if ranges is None:
        return []
    pairs = parse_ranges(ranges, 2**31, "must_do", "video tokens")
    if len(pairs) > MAX_MUST_DO_RANGES:
        raise ValueError(f"must_do has {len(pairs)} ranges, expected at most {MAX_MUST_DO_RANGES}")
    return pairs
