"""LiteAttention: the attention layer that skips what an earlier pass found not to matter."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from lite_attention import ops
from lite_attention.maps.keep_map import density, tile_counts
from lite_attention.ops import backward_pass
from lite_attention.ops.checks import checked_bool, checked_int
from lite_attention.ops.modes import real_tensors
from lite_attention.ops.own_state import hold
from lite_attention.skipping.arguments import (
    CheckedRanges,
    Ranges,
    Threshold,
    check_kv_lens,
    check_no_transform,
    check_not_recorded,
    check_scalar,
    check_scale,
    check_skip_fraction_out,
    checked_inputs,
    checked_ranges,
    checked_threshold,
)
from lite_attention.skipping.branches import BranchHolder, resolved_branch
from lite_attention.skipping.computed_pass import ComputedPass, remember
from lite_attention.skipping.must_words import must_words
from lite_attention.skipping.policy import SkipPolicy, environment_flag, verbose_by_environment
from lite_attention.skipping.slots import PassShape
from lite_attention.skipping.state import SkipState

__all__ = ["LiteAttention"]


class LiteAttention(BranchHolder):
    """Self-attention that skips the tiles which an earlier pass found not to matter.

    Give every attention layer its own instance and call it once per pass (per denoising step and branch). The first
    pass computes everything; each pass drops from the layer's keep map the tiles whose scores stayed more than
    ``threshold`` under the row's best so far, and the next pass does not compute them.
    Meant for the video-to-video self-attention of diffusion transformers. No gradients.

    ``copy.copy`` shares the state with the original, as torch's modules share buffers: passes of one advance the maps
    of the other. ``copy.deepcopy`` and pickle make a layer with a state of its own.

    Args:
        enable_skipping: True if None; False runs the dense operator and keeps no state.
        threshold: -10 if None; see :class:`lite_attention.SkipPolicy`.
        max_batch_size: largest batch a call may have.
        policy: all that the layer is told about skipping, in place of ``enable_skipping`` and ``threshold``.

    Raises:
        TypeError, ValueError: an argument is not what it should be.

    Environment, read when an instance is made; unset, empty and ``FALSE`` mean off:
        ``LITE_ATTENTION_VERBOSE`` logs state resets to the logger ``lite_attention``.
        ``LITE_ATTENTION_DEBUG`` permits thresholds above 0.
    """

    state: SkipState
    """What the layer remembers, on the device of its latest pass. Not a part of the layer that others see."""

    caller = "LiteAttention"
    """The class that the user calls: errors in a forward begin with it."""

    def __init__(
        self,
        enable_skipping: bool | None = None,
        threshold: Threshold | None = None,
        max_batch_size: int = 4,
        *,
        policy: SkipPolicy | None = None,
    ) -> None:
        super().__init__()
        policy = SkipPolicy.resolve("LiteAttention", policy, enable_skipping=enable_skipping, threshold=threshold)
        self.max_batch_size = checked_int("LiteAttention: max_batch_size", max_batch_size, lowest=1)
        self._policy = policy
        self._enabled = policy.enabled
        self.allows_positive_threshold = environment_flag("LITE_ATTENTION_DEBUG")
        hold(self, "state", SkipState(policy, verbose=verbose_by_environment()))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        return_softmax_lse: bool = False,
        must_do_list: Ranges | None = None,
        must_skip_list: Ranges | None = None,
        *,
        kv_lens: Tensor | None = None,
        branch: int | None = None,
        must_do_queries: Ranges | None = None,
        start_full: Tensor | None = None,
        generation: Tensor | None = None,
        skip_fraction_out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One attention pass.

        Args:
            query: ``[batch, query_len, heads, head_dim]``, bf16, fp16 or fp32; the last stride is 1.
            key, value: ``[batch, kv_len, kv_heads, head_dim]``; heads is a multiple of kv_heads.
            scale: factor on q.k before the softmax, ``1/sqrt(head_dim)`` if None.
            return_softmax_lse: also return the log of the softmax denominator.
            must_do_list: key ranges that are computed in this call whatever the map says, rounded outward to tiles, and
                that stay in the map. A flat list ``[start, end, ...]``, end exclusive, each pair ascending or
                descending; or an integer tensor ``[count, 2]`` on query's device, which may change from call to call
                without recompiling and whose values are clipped to the keys instead of checked.
            must_skip_list: key ranges that are left out of this call, same forms, rounded inward: only tiles that lie
                wholly inside. Their bits are kept for later calls. Where both lists name a tile, it is computed.
            kv_lens: int32 ``[batch]``; keys at and past it do not exist (padded batches).
            branch: whose skip state to use; None for the one of :class:`skip_branch`, or 0.
            must_do_queries: ranges of query rows, in the forms of must_do_list: the query tiles they touch compute and
                keep every tile, for instance those of text tokens. must_skip_list does not apply to them.
            start_full: bool, 0-d, on query's device. Where True, this pass starts from the full map, as after a reset.
            generation: int64, 0-d, on query's device: a number that is another for each video. The pass starts from the
                full map where the branch's latest pass had another one, however many passes were dense or left out
                since. A :class:`lite_attention.skipping.dense_steps.GenerationClock` makes both.
            skip_fraction_out: fp32, 0-d, on query's device; receives the share that this pass skips of all tiles.

        Returns:
            out, of query's shape and dtype (autocast's where it is on); with ``return_softmax_lse`` also lse, fp32
            ``[batch, heads, query_len]``, natural log over the keys that were computed. With skipping disabled both are
            dense, the must lists are only checked, and all that changes in the state is that a map of before
            ``start_full``, or of another ``generation``, does not count any more. A pass of
            FakeTensors starts from the full map and leaves the state alone.

        Raises:
            TypeError, ValueError: an argument does not fit; the text names it.
            RuntimeError: the operator refuses an argument; the text names it. With skipping enabled, inside a backward
                pass, where torch.utils.checkpoint computes a segment again.
            NotImplementedError: with skipping enabled, inside a transform of torch.func, torch.jit.trace or make_fx.
        """
        checked_bool(f"{self.caller}: return_softmax_lse", return_softmax_lse)
        computed = self.computed_pass(
            query,
            key,
            value,
            scale,
            must_do_list,
            must_skip_list,
            kv_lens,
            branch,
            must_do_queries,
            start_full,
            generation,
            skip_fraction_out,
        )
        remember(computed)
        return (computed.out, computed.lse) if return_softmax_lse else computed.out

    def computed_pass(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        must_do_list: Ranges | None = None,
        must_skip_list: Ranges | None = None,
        kv_lens: Tensor | None = None,
        branch: int | None = None,
        must_do_queries: Ranges | None = None,
        start_full: Tensor | None = None,
        generation: Tensor | None = None,
        skip_fraction_out: Tensor | None = None,
        told_len: int | None = None,
    ) -> ComputedPass:
        """A pass as :meth:`forward` makes it, for who remembers several together or none.

        Everything has been checked and computed then, and ``skip_fraction_out`` is written. ``told_len`` is as for
        :class:`PassShape`.
        """
        query, key, value = checked_inputs(self.caller, query, key, value, self.max_batch_size)
        branch = resolved_branch(branch, self.caller, self.chosen_branch)
        check_scale(self.caller, scale)
        must_do = checked_ranges(self.caller, "must_do_list", must_do_list, query, key.shape[1], "keys")
        must_skip = checked_ranges(self.caller, "must_skip_list", must_skip_list, query, key.shape[1], "keys")
        must_rows = checked_ranges(self.caller, "must_do_queries", must_do_queries, query, query.shape[1], "queries")
        check_kv_lens(self.caller, kv_lens, query)
        check_scalar(self.caller, "start_full", start_full, torch.bool, query)
        check_scalar(self.caller, "generation", generation, torch.int64, query)
        check_skip_fraction_out(self.caller, skip_fraction_out, query)
        if not self._enabled:
            out, lse = ops.attention(query, key, value, kv_lens=kv_lens, scale=scale)
            if skip_fraction_out is not None:
                skip_fraction_out.zero_()
            note = partial(self.state.note_dense_pass, branch, query.device, start_full, generation)
            is_remembered = torch.compiler.is_compiling() or not is_fake(query)
            return ComputedPass(out, lse, None, note if is_remembered else None)
        computed, visited = self._skipping_pass(
            query, key, value, scale, must_do, must_skip, must_rows, kv_lens, branch, start_full, generation, told_len
        )
        if skip_fraction_out is not None:
            _, kv_tiles = tile_counts(query.shape[1], key.shape[1], query.shape[3], query.dtype)
            skip_fraction_out.copy_(1.0 - density(visited, kv_tiles))
        return computed

    def _skipping_pass(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        must_do_ranges: CheckedRanges | None,
        must_skip_ranges: CheckedRanges | None,
        must_do_rows: CheckedRanges | None,
        kv_lens: Tensor | None,
        branch: int,
        start_full: Tensor | None,
        generation: Tensor | None,
        told_len: int | None,
    ) -> tuple[ComputedPass, Tensor]:
        """The pass, and the packed map of the tiles that were visited, its bits past the last tile undefined."""
        ranges = {"must_do_list": must_do_ranges, "must_skip_list": must_skip_ranges, "must_do_queries": must_do_rows}
        check_no_transform(self.caller, query=query, key=key, value=value, kv_lens=kv_lens)
        check_no_transform(self.caller, start_full=start_full, generation=generation, **ranges)
        # operator.index makes plain ints of sizes that torch.compile holds as symbols: the state belongs to one shape.
        batch, query_len, heads, head_dim = map(operator.index, query.shape)
        kv_len, kv_heads = operator.index(key.shape[1]), operator.index(key.shape[2])
        inputs = batch, query_len, kv_len, heads, kv_heads, head_dim, query.dtype, query.device
        shape = PassShape(*inputs, told_len)
        branch = operator.index(branch)
        state = self.state
        if state.threshold_heads not in (None, heads):
            raise ValueError(
                f"{self.caller}: threshold has {state.threshold_heads} values, expected {heads}, one per head"
            )
        is_compiling = torch.compiler.is_compiling()
        is_remembered = is_compiling or not is_fake(query)
        if is_remembered and backward_pass.running:
            backward_pass.refuse(self.caller)
        if is_remembered and not is_compiling:
            check_not_recorded(self.caller)
        room = state.room_for(branch, *shape, is_compiling) if is_remembered else None
        is_here = is_remembered and state.device == query.device
        threshold = state.threshold if is_here else state.new_threshold(query.device)
        recalled = state.first_pass(shape) if room is None else state.recall(room, branch, start_full, generation)
        keep = recalled.keep
        must_do, must_skip = must_words(
            must_do_ranges, must_skip_ranges, must_do_rows, query, key, words=keep.shape[-1]
        )
        visible = keep
        if must_skip is not None:
            visible = keep & ~must_skip  # must-do tiles among them are computed all the same: must_keep wins
        out, lse, next_keep = ops.skip_attention(
            query, key, value, visible, threshold, must_keep=must_do, kv_lens=kv_lens, scale=scale
        )
        if must_skip is not None:
            next_keep = next_keep | (keep & must_skip)
        owner = branch, shape
        make_room = partial(state.make_room, owner) if is_remembered else None
        write = partial(state.remember, recalled, owner, next_keep, start_full, generation) if is_remembered else None
        return ComputedPass(out, lse, make_room, write), visible if must_do is None else visible | must_do

    @property
    def policy(self) -> SkipPolicy:
        """What the layer is told about skipping, as it is now."""
        return self._policy.with_checked(threshold=self.threshold, enabled=self._enabled)

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold, in powers of two: one number, or one per query head.

        Takes effect from the next pass on, also in compiled and captured code, without recompiling (except when
        changing between one number and one per head). Tiles dropped already stay dropped until a reset.

        Raises:
            TypeError, ValueError: not numbers, NaN, or above 0 without ``LITE_ATTENTION_DEBUG``.
        """
        self.state.set_threshold(checked_threshold("set_threshold", threshold, self.allows_positive_threshold))

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """The threshold in powers of two: one number, or one per query head."""
        return self.state.threshold_values

    def reset_skip_state(self, branch: int | None = None) -> None:
        """Forget what was dropped, in one branch or in all of them: the next pass computes every tile.

        Call it whenever a new video (or prompt) starts.
        """
        self.state.reset(None if branch is None else resolved_branch(branch, "reset_skip_state"))

    @property
    def layout_version(self) -> int:
        """Another number where a CUDA graph captured before is out of date: other buffers, or skipping switched."""
        return self.state.layout

    def outdate_captured_graphs(self) -> None:
        """Let CUDA graphs captured before refuse to run: something they hold of this layer has changed."""
        self.state.outdate_captured_graphs()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LiteAttention:
        """As nn.Module's. The state stays; graphs captured before read weights where these no longer are."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with real_tensors():
            probe = torch.empty(0, dtype=torch.int64, device=self.state.device)
            if fn(probe) is not probe:
                self.outdate_captured_graphs()
        return self

    def _replicate_for_data_parallel(self) -> NoReturn:
        """What nn.DataParallel makes of every part in every call; the replicas would all write this layer's state."""
        raise RuntimeError(
            f"{self.caller}: nn.DataParallel makes copies of the model in each call, which would share one skip state, "
            "expected a model of its own for each device, as DistributedDataParallel has"
        )

    @property
    def skipping(self) -> bool:
        """Whether passes skip; see :meth:`enable_skip_optimization`."""
        return self._enabled

    def enable_skip_optimization(self, enable: bool = True) -> None:
        """Switch between skipping and dense attention; what dense passes change in the state, :meth:`forward` tells.

        Raises:
            TypeError: ``enable`` is not a bool.
        """
        checked_bool("enable_skip_optimization: enable", enable)
        if self._enabled != enable:
            self._enabled = enable
            self.state.is_off = not enable

    def skip_fraction(self, branch: int | None = None) -> Tensor:
        """Share of tiles that the branch's next skipping pass will skip: fp32, 0-d, on its device, without a sync.

        0 before the first pass and after a reset. ``branch`` None means the one of :class:`skip_branch`, or 0.
        """
        skipped, tiles_of_map = self.state.skipped_tiles(resolved_branch(branch, "skip_fraction"))
        fraction: Tensor = skipped / tiles_of_map.clamp(min=1)
        return fraction

    def skipped_tiles(self, branch: int | None = None) -> Tensor:
        """Tiles that the branch's next skipping pass will skip, and all tiles: fp32 ``[2]``, as :meth:`skip_fraction`.

        Both are 0 before the first pass and after a reset.
        """
        return self.state.skipped_tiles(resolved_branch(branch, "skipped_tiles"))

    def keep_map(self, branch: int | None = None) -> Tensor:
        """The map that the branch's next skipping pass will use: bool ``[batch, heads, query_tiles, kv_tiles]``.

        Waits for the device. After a reset, all True. ``branch`` as for :meth:`skip_fraction`.

        Raises:
            RuntimeError: the branch has not run yet, so its shape is unknown.
        """
        return self.state.keep_map(resolved_branch(branch, "keep_map"), "keep_map")

    def set_keep_map(self, keep_map: Tensor, branch: int | None = None) -> None:
        """Choose the map of the branch's next pass, for instance one saved with :meth:`keep_map`. Waits for the device.

        Later passes drop more of it, unless the threshold is -inf, which drops nothing. Dense steps that the layer
        counts itself end with it, until a reset or a pass told ``start_full``. The next pass uses it whatever
        ``generation`` it is told, and it is of that one then; a ``start_full`` that is True still starts full.

        Args:
            keep_map: bool ``[batch, heads, query_tiles, kv_tiles]``, True for a tile to compute; sizes of 1 broadcast.
            branch: as for :meth:`skip_fraction`.

        Raises:
            RuntimeError: the branch has not run yet, so its shape is unknown.
            TypeError, ValueError: ``keep_map`` is no tensor of bool or does not broadcast to the branch's map.
        """
        self.state.set_keep_map(keep_map, resolved_branch(branch, "set_keep_map"), "set_keep_map")

    def tile_shape(self, branch: int | None = None) -> tuple[int, int]:
        """Rows of a query tile and keys of a KV tile in the branch's map. Waits for the device.

        Raises:
            RuntimeError: the branch has not run yet, so its head dim and dtype are unknown.
        """
        return self.state.tile_shape(resolved_branch(branch, "tile_shape"), "tile_shape")

    def used_branches(self) -> list[int]:
        """Branches that have had a skipping pass. Waits for the device."""
        return self.state.used_branches()

    def query_heads_per_key(self, branch: int | None = None) -> int:
        """How many query heads shared a key head in the branch's latest pass. Waits for the device.

        Raises:
            RuntimeError: the branch has not run yet.
        """
        shape = self.state.last_shape(resolved_branch(branch, "query_heads_per_key"), "query_heads_per_key")
        return shape.heads // shape.kv_heads

    def __repr__(self) -> str:
        return f"{type(self).__name__}(policy={self.policy}, max_batch_size={self.max_batch_size})"
