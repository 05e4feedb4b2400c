"""Attention modules that remember, from one denoising step to the next, which tiles may be skipped.

The memory is one keep map per branch, held in registered buffers that stay out of the state_dict. Everything that
changes between passes (maps, thresholds, resets, which shape a map belongs to) is a tensor that is written in place, so
a compiled or captured forward reads today's values, and nothing in forward waits for the device.

How a map is found, and why it is never stale:

* A module owns ``MAP_SLOTS`` slots. A slot belongs to one (branch, shape) at a time and holds that pair's map; shape
  means batch, lengths, heads, head dim, dtype and device.
* Each (branch, shape) has a fixed number, its stamp. A pass writes its stamp beside the map it wrote and beside its
  branch. A map counts only while both carry the pass's own stamp; otherwise the pass starts from the full map.
  So a pass with another shape, a slot given to someone else and a reset (negative stamps) need no new compilation.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import operator
import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lite_attention import ops
from lite_attention.maps import tiles
from lite_attention.maps.keep_map import (
    density,
    keep_map_shape,
    pack_keep_map,
    tile_counts,
    tiles_inside,
    tiles_touched,
    unpack_keep_map,
)
from lite_attention.skipping.arguments import (
    CheckedRanges,
    Ranges,
    Threshold,
    check_inputs,
    check_scalar,
    check_scale,
    checked_ranges,
    checked_threshold,
)
from lite_attention.skipping.branches import MAX_BRANCHES, resolved_branch

__all__ = ["MAP_SLOTS", "LiteAttention"]

# A layer remembers the maps of this many (branch, shape) pairs; the oldest makes room for one more. As many as the
# graphs that torch.compile keeps of one function by default.
MAP_SLOTS = 8

_logger = logging.getLogger("lite_attention")


class _Shape(NamedTuple):
    """What a keep map depends on. A map of one shape says nothing about another."""

    batch: int
    query_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def map_shape(self) -> tuple[int, int, int, int]:
        return keep_map_shape(self.batch, self.heads, self.query_len, self.kv_len, self.head_dim, self.dtype)

    def kv_tiles(self) -> int:
        return tile_counts(self.query_len, self.kv_len, self.head_dim, self.dtype)[1]

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, {self.query_len} queries, {self.kv_len} keys, {self.heads}/{self.kv_heads} heads, "
            f"head_dim {self.head_dim}, {self.dtype}, {self.device}"
        )


@functools.cache
def _stamp(branch: int, shape: _Shape) -> int:
    """A positive number that stands for (branch, shape): the same in every layer, process and run."""
    text = f"{branch}|{tuple(map(str, shape))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1 | 1


class _MapSlot(nn.Module):
    """Room for one packed keep map. A module of its own so that torch.compile meets it only once it is filled."""

    words: Tensor
    stamp: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.owner: tuple[int, _Shape] | None = None
        self.register_buffer("words", torch.empty(0, dtype=torch.int32), persistent=False)
        self.register_buffer("stamp", torch.zeros((), dtype=torch.int64), persistent=False)

    def give_to(self, branch: int, shape: _Shape) -> None:
        self.owner = branch, shape
        if self.words.shape != shape.map_shape() or self.words.device != shape.device:
            self.words = torch.empty(shape.map_shape(), dtype=torch.int32, device=shape.device)
        if self.stamp.device != shape.device:
            self.stamp = torch.zeros((), dtype=torch.int64, device=shape.device)
        self.stamp.zero_()

    def empty(self, device: torch.device) -> None:
        self.owner = None
        self.words = torch.empty(0, dtype=torch.int32, device=device)
        self.stamp = torch.zeros((), dtype=torch.int64, device=device)


# Every living module, so that compiling one layer can make room in its sisters (see LiteAttention._find_slot).
_instances: weakref.WeakSet[LiteAttention] = weakref.WeakSet()


class LiteAttention(nn.Module):
    """Self-attention that skips the tiles which an earlier pass found not to matter.

    Give every attention layer its own instance and call it once per pass (per denoising step and branch). The first
    pass computes everything; each pass drops from the layer's keep map the tiles whose scores stayed more than
    ``threshold`` under the row's best so far, and the next pass does not compute them.
    Meant for the video-to-video self-attention of diffusion transformers. No gradients.

    Args:
        enable_skipping: False runs the dense operator and keeps no state.
        threshold: in powers of two, at most 0. -10 drops what is below a thousandth of the row's best so far; lower
            drops less, -inf nothing, 0 keeps only what raises a row's maximum. One number, or one per query head.
        max_batch_size: largest batch a call may have.

    Raises:
        TypeError, ValueError: an argument is not what it should be.

    Environment, read when an instance is made; unset, empty and ``FALSE`` mean off:
        ``LITE_ATTENTION_VERBOSE`` logs state resets to the logger ``lite_attention``.
        ``LITE_ATTENTION_DEBUG`` permits thresholds above 0.
    """

    layout_version: int
    """Grows whenever a CUDA graph captured before is out of date: a buffer in use replaced, skipping switched."""

    _threshold: Tensor
    _live: Tensor

    def __init__(self, enable_skipping: bool = True, threshold: Threshold = -10.0, max_batch_size: int = 4) -> None:
        super().__init__()
        if isinstance(max_batch_size, bool) or not isinstance(max_batch_size, int):
            raise TypeError(f"LiteAttention: max_batch_size has type {type(max_batch_size).__name__}, expected an int")
        if max_batch_size < 1:
            raise ValueError(f"LiteAttention: max_batch_size is {max_batch_size}, expected at least 1")
        self.max_batch_size = max_batch_size
        self.layout_version = 0
        self._enabled = bool(enable_skipping)
        self.allows_positive_threshold = _flag("LITE_ATTENTION_DEBUG")
        self._verbose = _flag("LITE_ATTENTION_VERBOSE")
        if self._verbose:
            _show_log()
        self._last_shapes: dict[int, _Shape] = {}
        self._oldest = 0
        # Buffers outlive the mode they are made in; an inference tensor could not be written outside that mode.
        with torch.inference_mode(False):
            values = checked_threshold(threshold, self.allows_positive_threshold)
            self._threshold_values = values
            self.register_buffer("_threshold", torch.tensor(values, dtype=torch.float32), persistent=False)
            self.register_buffer("_live", torch.zeros(MAX_BRANCHES, dtype=torch.int64), persistent=False)
            self._slots = nn.ModuleList(_MapSlot() for _ in range(MAP_SLOTS))
        _instances.add(self)

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
            skip_fraction_out: fp32, 0-d, on query's device; receives the share of the tiles that this pass skips.

        Returns:
            out, of query's shape and dtype; with ``return_softmax_lse`` also lse, fp32 ``[batch, heads, query_len]``,
            natural log over the keys that were computed. With skipping disabled both are dense, the must lists are
            only checked, and the state is neither read nor written.

        Raises:
            TypeError, ValueError: an argument does not fit; the text names it.
            RuntimeError: the operator refuses an argument; the text names it.
        """
        check_inputs("LiteAttention", query, key, value, self.max_batch_size)
        branch = resolved_branch(branch, "LiteAttention")
        check_scale("LiteAttention", scale)
        must_do = checked_ranges("LiteAttention", "must_do_list", must_do_list, query, key.shape[1], "keys")
        must_skip = checked_ranges("LiteAttention", "must_skip_list", must_skip_list, query, key.shape[1], "keys")
        must_rows = checked_ranges(
            "LiteAttention", "must_do_queries", must_do_queries, query, query.shape[1], "queries"
        )
        check_scalar("LiteAttention", "start_full", start_full, torch.bool, query)
        check_scalar("LiteAttention", "skip_fraction_out", skip_fraction_out, torch.float32, query)
        if not self._enabled:
            out, lse = ops.attention(query, key, value, kv_lens=kv_lens, scale=scale)
            if skip_fraction_out is not None:
                skip_fraction_out.zero_()
        else:
            out, lse, visited = self._skipping_pass(
                query, key, value, scale, must_do, must_skip, must_rows, kv_lens, branch, start_full
            )
            if skip_fraction_out is not None:
                _, kv_tiles = tile_counts(query.shape[1], key.shape[1], query.shape[3], query.dtype)
                skip_fraction_out.copy_(1.0 - density(visited, kv_tiles))
        return (out, lse) if return_softmax_lse else out

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Out, lse, and the packed map of the tiles that were visited, its bits past the last tile undefined."""
        # operator.index makes plain ints of sizes that torch.compile holds as symbols: the state belongs to one shape.
        batch, query_len, heads, head_dim = map(operator.index, query.shape)
        index, stamp = self._find_slot(
            operator.index(branch),
            batch,
            query_len,
            operator.index(key.shape[1]),
            heads,
            operator.index(key.shape[2]),
            head_dim,
            query.dtype,
            query.device,
            torch.compiler.is_compiling(),
        )
        threshold = self._threshold
        if threshold.dim() == 1 and threshold.shape[0] != heads:
            raise ValueError(
                f"LiteAttention: threshold has {threshold.shape[0]} values, expected {heads}, one per head"
            )
        slot: _MapSlot = self._slots[index]
        live = self._live[branch]
        # Rows of words for every batch and head, which the operators broadcast.
        must_do = _row_of_words(must_do_ranges, tiles_touched, query, key)
        must_skip = _row_of_words(must_skip_ranges, tiles_inside, query, key)
        if must_do_rows is not None:
            tile_m, _ = tiles.tile_shape(head_dim, query.dtype)
            rows = tiles_touched(must_do_rows, query_len, tile_m, query.device)
            others = torch.zeros_like(live, dtype=torch.int32) if must_do is None else must_do
            must_do = torch.where(rows[:, None], -1, others).expand(1, 1, -1, slot.words.shape[-1])

        current = (live == stamp) & (slot.stamp == stamp)
        if start_full is not None:
            current = current & ~start_full
        keep = torch.where(current, slot.words, -1)
        visible = keep
        if must_skip is not None:
            visible = keep & ~must_skip  # must-do tiles among them are computed all the same: must_keep wins
        out, lse, next_keep = ops.skip_attention(
            query, key, value, visible, threshold, must_keep=must_do, kv_lens=kv_lens, scale=scale
        )
        if must_skip is not None:
            next_keep = next_keep | (keep & must_skip)
        slot.words.copy_(next_keep)
        slot.stamp.fill_(stamp)
        live.fill_(stamp)
        return out, lse, visible if must_do is None else visible | must_do

    @torch.compiler.assume_constant_result
    def _find_slot(
        self,
        branch: int,
        batch: int,
        query_len: int,
        kv_len: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        compiling: bool,
    ) -> tuple[int, int]:
        """(slot, stamp) of this branch and shape, making room for its map if there is none yet.

        Under torch.compile this runs while the graph is traced and its result is a constant of the graph. What it says
        never goes out of date for the shapes that the graph is guarded on: a slot taken by another pair since then has
        another size, which retraces, or another stamp, which the graph sees as a full map.

        A layer that makes room while it is traced makes the same room in the layers that have so far seen the same
        shapes. Otherwise each of them would fail the guards of the one graph that fits them all, and be traced again.
        """
        shape = _Shape(batch, query_len, kv_len, heads, kv_heads, head_dim, dtype, device)
        owner = (branch, shape)
        stamp = _stamp(branch, shape)
        last = self._last_shapes.get(branch)
        if self._verbose and last is not None and last != shape:
            _logger.info("branch %d: skip state reset, the inputs changed from (%s) to (%s)", branch, last, shape)
        self._last_shapes[branch] = shape

        if self._live.is_inference() and not torch.is_inference_mode_enabled():
            self._start_over(self._device())  # a copy made in inference mode: its state could not be written here
        owners = self._owners()
        if owner in owners:
            return owners.index(owner), stamp
        if torch.compiler.is_exporting():
            raise RuntimeError(
                f"LiteAttention: no room for a keep map of these inputs ({shape}) to export; call the module once on "
                "inputs of this shape and branch before torch.export"
            )
        layers = [self]
        if compiling:
            layers += [
                other
                for other in _instances
                if other is not self and other._owners() == owners and other._device() == self._device()
            ]
        with torch.inference_mode(False):
            for layer in layers:
                layer._make_room(branch, shape)
        return self._owners().index(owner), stamp

    def _owners(self) -> list[tuple[int, _Shape] | None]:
        return [slot.owner for slot in self._all_slots()]

    def _all_slots(self) -> list[_MapSlot]:
        return list(self._slots)  # type: ignore[arg-type]

    def _device(self) -> torch.device:
        return self._live.device

    def _make_room(self, branch: int, shape: _Shape) -> None:
        if self._device() != shape.device:
            self._start_over(shape.device)
        owners = self._owners()
        index = owners.index(None) if None in owners else self._slot_to_give_away(branch)
        slot = self._all_slots()[index]
        if slot.owner is not None:
            self.outdate_captured_graphs()
        slot.give_to(branch, shape)

    def _slot_to_give_away(self, branch: int) -> int:
        """The oldest slot of the same branch, whose map of another shape is out of date; else the oldest of all."""
        by_age = [(self._oldest + age) % MAP_SLOTS for age in range(MAP_SLOTS)]
        owners = self._owners()
        index = next((i for i in by_age if owners[i] is not None and owners[i][0] == branch), by_age[0])  # type: ignore[index]
        if self._verbose:
            _logger.info("all %d slots are taken: the map of branch and shape %s makes room", MAP_SLOTS, owners[index])
        self._oldest = (index + 1) % MAP_SLOTS
        return index

    def _start_over(self, device: torch.device) -> None:
        """Threshold and empty state on a device, from what Python knows alone."""
        with torch.inference_mode(False):
            self._threshold = torch.tensor(self._threshold_values, dtype=torch.float32, device=device)
            self._live = torch.zeros(MAX_BRANCHES, dtype=torch.int64, device=device)
            self._oldest = 0
            self.outdate_captured_graphs()
            for slot in self._all_slots():
                slot.empty(device)

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold, in powers of two: one number, or one per query head.

        Takes effect from the next pass on, also in compiled and captured code, without recompiling (except when
        changing between one number and one per head). Tiles dropped already stay dropped until a reset.

        Raises:
            TypeError, ValueError: not numbers, NaN, or above 0 without ``LITE_ATTENTION_DEBUG``.
        """
        values = checked_threshold(threshold, self.allows_positive_threshold)
        if isinstance(values, float) and self._threshold.dim() == 0:
            self._threshold.fill_(values)
        else:
            with torch.inference_mode(False):
                new = torch.tensor(values, dtype=torch.float32, device=self._device())
            if new.shape == self._threshold.shape:
                self._threshold.copy_(new)
            else:
                self._threshold = new
                self.outdate_captured_graphs()
        self._threshold_values = values

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """The threshold in powers of two: one number, or one per query head."""
        return self._threshold_values

    def reset_skip_state(self, branch: int | None = None) -> None:
        """Forget what was dropped, in one branch or in all of them: the next pass computes every tile.

        Call it whenever a new video (or prompt) starts.
        """
        live = self._live if branch is None else self._live[resolved_branch(branch, "reset_skip_state")]
        # No stamp is negative, so no map counts as current; keep_map() still sees which shape was.
        live.abs_().neg_()

    def outdate_captured_graphs(self) -> None:
        """Let CUDA graphs captured before refuse to run: something they hold of this layer has changed."""
        self.layout_version += 1

    @property
    def skipping(self) -> bool:
        """Whether passes skip; see :meth:`enable_skip_optimization`."""
        return self._enabled

    def enable_skip_optimization(self, enable: bool = True) -> None:
        """Switch between skipping and dense attention. Dense passes leave the skip state as it is."""
        if self._enabled != bool(enable):
            self._enabled = bool(enable)
            self.outdate_captured_graphs()

    def skip_fraction(self, branch: int | None = None) -> Tensor:
        """Share of tiles that the branch's next pass will skip: fp32, 0-d, on the state's device, without a sync.

        0 before the first pass and after a reset. ``branch`` None means the one of :class:`skip_branch`, or 0.
        """
        skipped, tiles_of_map = self.skipped_tiles(branch)
        fraction: Tensor = skipped / tiles_of_map.clamp(min=1)
        return fraction

    def skipped_tiles(self, branch: int | None = None) -> Tensor:
        """Tiles that the branch's next pass will skip, and all tiles: fp32 ``[2]``, as :meth:`skip_fraction`.

        Both are 0 before the first pass and after a reset.
        """
        branch = resolved_branch(branch, "skip_fraction")
        counts = torch.zeros(2, device=self._device())
        for slot, shape in self._maps_of(branch):
            all_tiles = math.prod(shape.map_shape()[:-1]) * shape.kv_tiles()
            skipped = (1.0 - density(slot.words, shape.kv_tiles())) * all_tiles
            both = torch.stack([skipped, torch.full_like(skipped, all_tiles)])
            counts = torch.where(self._is_current(slot, branch, shape), both, counts)
        return counts

    def keep_map(self, branch: int | None = None) -> Tensor:
        """The map that the branch's next pass will use: bool ``[batch, heads, query_tiles, kv_tiles]``.

        Waits for the device. After a reset, all True. ``branch`` as for :meth:`skip_fraction`.

        Raises:
            RuntimeError: the branch has not run yet, so its shape is unknown.
        """
        branch = resolved_branch(branch, "keep_map")
        slot, shape = self._last_map(branch, "keep_map")
        if bool(self._is_current(slot, branch, shape)):
            return unpack_keep_map(slot.words, shape.kv_tiles())
        return slot.words.new_ones(*shape.map_shape()[:-1], shape.kv_tiles(), dtype=torch.bool)

    def set_keep_map(self, keep_map: Tensor, branch: int | None = None) -> None:
        """Choose the map of the branch's next pass, for instance one saved with :meth:`keep_map`. Waits for the device.

        Later passes drop more of it, unless the threshold is -inf, which drops nothing.

        Args:
            keep_map: bool ``[batch, heads, query_tiles, kv_tiles]``, True for a tile to compute; sizes of 1 broadcast.
            branch: as for :meth:`skip_fraction`.

        Raises:
            RuntimeError: the branch has not run yet, so its shape is unknown.
            TypeError, ValueError: ``keep_map`` is not bool or does not broadcast to the branch's map.
        """
        branch = resolved_branch(branch, "set_keep_map")
        slot, shape = self._last_map(branch, "set_keep_map")
        expected = (*shape.map_shape()[:-1], shape.kv_tiles())
        sizes = list(keep_map.shape)
        if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, expected, strict=True)):
            raise ValueError(f"set_keep_map: keep_map has shape {sizes}, expected {list(expected)} or sizes of 1")
        slot.words.copy_(pack_keep_map(keep_map.expand(expected).to(shape.device)))
        stamp = _stamp(branch, shape)
        slot.stamp.fill_(stamp)
        self._live[branch].fill_(stamp)

    def tile_shape(self, branch: int | None = None) -> tuple[int, int]:
        """Rows of a query tile and keys of a KV tile in the branch's map. Waits for the device.

        Raises:
            RuntimeError: the branch has not run yet, so its head dim and dtype are unknown.
        """
        branch = resolved_branch(branch, "tile_shape")
        _, shape = self._last_map(branch, "tile_shape")
        return tiles.tile_shape(shape.head_dim, shape.dtype)

    def used_branches(self) -> list[int]:
        """Branches that have had a skipping pass. Waits for the device."""
        return [branch for branch, live in enumerate(self._live.tolist()) if live != 0]

    def query_heads_per_key(self, branch: int | None = None) -> int:
        """How many query heads shared a key head in the branch's latest pass. Waits for the device.

        Raises:
            RuntimeError: the branch has not run yet.
        """
        _, shape = self._last_map(resolved_branch(branch, "query_heads_per_key"), "query_heads_per_key")
        return shape.heads // shape.kv_heads

    def _last_map(self, branch: int, name: str) -> tuple[_MapSlot, _Shape]:
        """The slot and shape of the branch's latest pass, whether its map still counts or was reset."""
        live = abs(int(self._live[branch]))
        for slot, shape in self._maps_of(branch):
            if live == _stamp(branch, shape):
                return slot, shape
        raise RuntimeError(f"{name}: branch {branch} has no keep map yet, expected a skipping pass before")

    def _maps_of(self, branch: int) -> list[tuple[_MapSlot, _Shape]]:
        return [(slot, slot.owner[1]) for slot in self._all_slots() if slot.owner and slot.owner[0] == branch]

    def _is_current(self, slot: _MapSlot, branch: int, shape: _Shape) -> Tensor:
        stamp = _stamp(branch, shape)
        return (self._live[branch] == stamp) & (slot.stamp == stamp)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LiteAttention:
        """As nn.Module's, but the threshold stays fp32 and a map that was moved starts over (``.to``, ``to_empty``)."""
        threshold, live = self._threshold, self._live
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._live is not live:
            self._start_over(self._live.device)
        elif self._threshold is not threshold:
            self._threshold = threshold
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _instances.add(self)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(enable_skipping={self._enabled}, threshold={self.threshold}, "
            f"max_batch_size={self.max_batch_size})"
        )


def _flag(name: str) -> bool:
    return os.environ.get(name, "FALSE") not in ("", "FALSE")


def _show_log() -> None:
    """Let info messages reach the terminal if the application has not set up logging for them."""
    if not _logger.hasHandlers():
        _logger.addHandler(logging.StreamHandler())
    if not _logger.isEnabledFor(logging.INFO):
        _logger.setLevel(logging.INFO)


def _row_of_words(
    ranges: CheckedRanges | None, cover: Callable[..., Tensor], query: Tensor, key: Tensor
) -> Tensor | None:
    """The ranges as a packed map ``[1, 1, 1, words]``, by way of ``cover``: ranges -> bool per KV tile."""
    if ranges is None:
        return None
    _, tile_n = tiles.tile_shape(query.shape[-1], query.dtype)
    return pack_keep_map(cover(ranges, key.shape[1], tile_n, query.device)).view(1, 1, 1, -1)
