"""What users call: LiteAttention for a transformer or pipeline, its settings, its figures, and the way back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lite_attention.integrations.diffusers import _internals
from lite_attention.integrations.diffusers.context_parallel import common_mesh
from lite_attention.integrations.diffusers.generation import Generation, checked_pairs
from lite_attention.integrations.diffusers.guidance import BranchNames, Guidance, check_guidance
from lite_attention.integrations.diffusers.patching import PatchedTransformer
from lite_attention.integrations.diffusers.processor import LiteAttentionProcessor, layer_attention
from lite_attention.parallel.distributed import DistributedLiteAttention
from lite_attention.skipping.arguments import Threshold, checked_threshold
from lite_attention.skipping.branches import resolved_branch
from lite_attention.skipping.module import LiteAttention
from lite_attention.skipping.policy import SkipPolicy
from lite_attention.skipping.state import share_room

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["LiteAttentionHandle", "enable_lite_attention"]


def enable_lite_attention(
    transformer_or_pipeline: Any,
    threshold: Threshold | None = None,
    dense_steps: int | None = None,
    must_do: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    mesh: DeviceMesh | None = None,
    guidance: Guidance | None = None,
    *,
    policy: SkipPolicy | None = None,
) -> LiteAttentionHandle:
    """Let the video self-attention of a diffusers model skip what earlier denoising steps found negligible.

    Guidance branches are kept apart, whether they are batched or run one after the other inside
    ``transformer.cache_context``, as pipelines run them. A new generation is noticed by its timesteps, in a pipeline
    also by those that its scheduler is given. Timesteps alone do not tell of each: where nobody sees the scheduler, see
    :meth:`LiteAttentionHandle.reset`.

    Args:
        transformer_or_pipeline: a transformer of a class that diffusers or :func:`register_video_model` brings, or a
            pipeline with one or two of them (``transformer``, ``transformer_2``), whose scheduler is looked at. May be
            compiled.
        threshold: in powers of two, at most 0, one number or one per head: see :class:`lite_attention.SkipPolicy`.
            -10 if None.
        dense_steps: compute every tile in so many steps at the start of a generation (of the first transformer).
        must_do: as for :meth:`LiteAttentionHandle.set_must_do`.
        layers: numbers of the self-attention layers that skip, in the order of the model, negative ones from its end;
            None for all. The others are left as they are.
        mesh: the ranks that make one video together, a DeviceMesh with the dimensions "ring" and "ulysses", of size 1
            where not used. Diffusers' context parallelism over it is enabled, until
            :meth:`LiteAttentionHandle.disable`, or was before. None takes the mesh of the context parallelism that was
            enabled before, if any.
        guidance: how guidance branches are run. "named": each inside the transformer's ``cache_context``, where nothing
            else is run; "batched": all in one call, or there is one branch only. None finds out: calls of one name, or
            of none, that come twice in one step or with another text may be of several streams, and from the first of
            them on nothing is skipped in this generation; see :meth:`LiteAttentionHandle.mixed_calls`.
        policy: all that the layers are told about skipping, in place of ``threshold`` and ``dense_steps``.

    Returns:
        A handle to change settings, read what was skipped, and go back.

    Raises:
        TypeError: no transformer of a known class, or an argument is of another type.
        ValueError: an argument is not what it should be, LiteAttention is in the model already, the tokens of this
            model cannot be split.
        RuntimeError: one of two transformers is set up for context parallelism, or ``mesh`` is given without an
            accelerator.
    """
    policy = SkipPolicy.resolve("enable_lite_attention", policy, threshold=threshold, dense_steps=dense_steps)
    transformers = _transformers_of(transformer_or_pipeline)
    check_guidance(transformers.values(), guidance)
    is_pipeline = not isinstance(transformer_or_pipeline, nn.Module)
    pipeline = transformer_or_pipeline if is_pipeline else None
    return LiteAttentionHandle(transformers, pipeline, policy, must_do, layers, mesh, watched=guidance is None)


def _transformers_of(model: Any) -> dict[str, nn.Module]:
    """The transformers to change, by the prefix that their layers' names get."""
    if isinstance(model, nn.Module):
        return {"": _internals.uncompiled(model)}
    found = {
        f"{name}.": _internals.uncompiled(component)
        for name in ("transformer", "transformer_2")
        if isinstance(component := getattr(model, name, None), nn.Module)
    }
    if not found:
        raise TypeError(
            f"enable_lite_attention: transformer_or_pipeline is a {type(model).__name__}, expected a video transformer "
            "or a pipeline that has one as its component transformer"
        )
    return found


class LiteAttentionHandle:
    """What :func:`enable_lite_attention` returns: settings, state and figures of all layers, and the way back."""

    layers: dict[str, LiteAttention | DistributedLiteAttention]
    """The attention of each layer, by the name of its module (in a pipeline: component name, dot, module name)."""

    def __init__(
        self,
        transformers: dict[str, nn.Module],
        pipeline: object | None,
        policy: SkipPolicy,
        must_do: Sequence[int] | None,
        layers: Sequence[int] | None,
        mesh: DeviceMesh | None,
        watched: bool,
    ) -> None:
        pairs = checked_pairs(must_do)
        mesh = common_mesh(transformers, mesh)
        make_attention = functools.partial(layer_attention, policy, mesh)
        self._branches = BranchNames()
        self._patched: list[PatchedTransformer] = []
        self.layers = {}
        self._processors: dict[str, LiteAttentionProcessor] = {}
        with ExitStack() as where_it_fails:
            where_it_fails.callback(self._restore_transformers)
            for prefix, transformer in transformers.items():
                # The first steps of a generation are the first transformer's, where there are two for its two phases.
                generation = Generation(policy.dense_steps if not self._patched else 0, watched)
                patched = PatchedTransformer(
                    transformer, self._branches, policy, make_attention, generation, layers, mesh, pipeline
                )
                self._patched.append(patched)
                for name, processor in patched.processors.items():
                    self.layers[f"{prefix}{name}"] = processor.attention
                    self._processors[f"{prefix}{name}"] = processor
                patched.set_must_do(pairs)
            share_room(*transformers.values())
            where_it_fails.pop_all()

    def __repr__(self) -> str:
        layers = f"{len(self.layers)} layers"
        if not self._patched:
            return f"LiteAttentionHandle({layers}, disabled)"
        policy = next(iter(self.layers.values())).policy
        return f"LiteAttentionHandle({layers}, {policy}, mixed_calls={self.mixed_calls()})"

    def reset(self) -> None:
        """Start a new generation: the next call of every branch computes every tile.

        To be called before every video where nobody sees a pipeline's scheduler: in a loop of your own, where a
        pipeline's bare transformer was enabled, and where one is compiled as a whole, captured or exported without a
        ``cache_context`` around it. Also after batch entries of one text have changed places (resampling). Never
        recompiles.
        """
        for patched in self._patched:
            patched.generation.start()

    def mixed_calls(self) -> int:
        """Model calls so far that may be of another stream than the call before in their branch.

        They have its timestep, in the same step of the pipeline's scheduler, or another text, or choose the branch in
        another way. Streams (guidance branches, tiles of a latent) must not mix their maps: from such a call to the end
        of its generation every tile of the branch is computed. With ``guidance`` given nothing is suspected, and this
        is 0. Where it is not 0, the log says once what to do. Waits for the device.
        """
        return sum(patched.generation.mixed_calls() for patched in self._patched)

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold of every layer; see :meth:`lite_attention.LiteAttention.set_threshold`.

        Raises:
            TypeError, ValueError: as there, or there is not one for each head of every layer; then none is changed.
        """
        values = checked_threshold("set_threshold", threshold, allow_positive=True)  # each layer knows what it allows
        for patched in self._patched:
            patched.check_threshold_count("set_threshold", values)
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
        pairs = checked_pairs(ranges)
        for patched in self._patched:
            patched.set_must_do(pairs)

    def skip_fraction(self, branch: str | int = 0) -> Tensor:
        """Share of the tiles that each layer skipped in each step of its latest generation. Waits for the device.

        Args:
            branch: name given to ``cache_context`` ("cond", "uncond", ...), or number of the branch.

        Returns:
            fp32 ``[layers, steps]`` on the CPU, layers in the order of :attr:`layers`; NaN where a layer did not run.
            The steps are the branch's own, from its first one in the latest generation that it was called in.
            At most ``RECORDED_STEPS`` steps. On many GPUs: of this rank's share of the work.

        Raises:
            TypeError, ValueError: no such branch, or none of that name has run.
        """
        self.mixed_calls()
        number = self._branches.known_number(branch) if isinstance(branch, str) else branch
        index = resolved_branch(number, "skip_fraction")
        rows = [processor.skip_fractions(index) for processor in self._processors.values()]
        table = torch.full((len(rows), max(map(len, rows))), torch.nan, dtype=torch.float32)
        for row, fractions in zip(table, rows, strict=True):
            row[: len(fractions)] = fractions
        return table

    def disable(self) -> None:
        """Give the layers their own processors back and forget the state. The handle is of no use afterwards."""
        self._restore_transformers()

    def _restore_transformers(self) -> None:
        with ExitStack() as each:  # also after an error in one
            while self._patched:
                each.callback(self._patched.pop().restore)
