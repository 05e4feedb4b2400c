"""LiteAttention in any model that calls ``torch.nn.functional.scaled_dot_product_attention``.

For models without a door of their own. The skip state belongs to the module that makes the call, and to how many it has
made before in the same call of the model, whoever computed them; the order in which modules run says nothing. Calls
that failed do not count. Where a step makes another number of them than those before, it cannot be told which is
which: the module runs dense from then on.
"""

from __future__ import annotations

import functools
import logging
import re
from types import AsyncGeneratorType, CoroutineType, GeneratorType, TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lite_attention.integrations._forwards import Forward, put, stand_in, stands, take_away
from lite_attention.integrations._left_to_torch import why_left_to_torch
from lite_attention.integrations._routing import foreign_function_mode, route_sdpa, unrouted_sdpa
from lite_attention.integrations._sdpa_layers import FOREIGN_MODE, MIXED, SHARED, Layer, Streams
from lite_attention.integrations._sdpa_steps import FOREIGN, Steps, TakenBack, UnderWay
from lite_attention.ops.checks import checked_int
from lite_attention.skipping.arguments import Threshold
from lite_attention.skipping.branches import MAX_BRANCHES, resolved_branch
from lite_attention.skipping.module import LiteAttention
from lite_attention.skipping.policy import SkipPolicy
from lite_attention.skipping.state import share_room

__all__ = ["LiteSDPA"]

_logger = logging.getLogger("lite_attention")


class LiteSDPA(nn.Module):
    """Context manager: self-attention calls of chosen modules skip what earlier passes found negligible.

    Inside it, a call of ``scaled_dot_product_attention`` made in the forward of a chosen module goes to that module's
    own :class:`lite_attention.LiteAttention`, if it is video self-attention that LiteAttention has kernels for. Every
    other call stays torch's, and :meth:`summary` tells why. A module that makes several such calls in one call of the
    model, in one forward or since it runs several times, has a map for each: the first, the second and so on of each
    step, those counted that stay torch's. Once a step has made another number of calls than those before, all of the
    module's stay torch's until :meth:`reset`; the log and :meth:`summary` say so. A call belongs to the innermost
    chosen module, and inside of a torch function mode of someone else to that mode. It may be entered and left as
    often as one likes, and inside others; the state stays. Guidance branches are chosen with
    :class:`lite_attention.skip_branch`, around the model or inside of it. Threads may call ``model`` at the same
    time, in branches of their own; what else a thread calls while another one is inside of the model is torch's.

    Args:
        model: what one step calls as a module, and the modules belong to: other methods, and forwards taken before,
            begin no step that could be seen. It is changed only inside the context.
        layers: regular expression that matches the whole name (as in ``model.named_modules()``) of each module to take
            over.
        threshold, max_batch_size, policy: as for :class:`lite_attention.LiteAttention`. Larger batches stay torch's.

    Raises:
        TypeError: an argument is not what it should be. In a forward: it is a generator or a coroutine.
        ValueError: no module has such a name, or none that is ever called.
        RuntimeError: in a forward: a module makes more such calls than there are branches, or another number of them
            in one compiled step than in another. When left: it was not entered.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str,
        threshold: Threshold | None = None,
        max_batch_size: int = 4,
        *,
        policy: SkipPolicy | None = None,
    ) -> None:
        super().__init__()
        policy = SkipPolicy.resolve("LiteSDPA", policy, threshold=threshold)
        checked_int("LiteSDPA: max_batch_size", max_batch_size, lowest=1)
        chosen, around = _find(model, layers)
        streams, steps = Streams(), Steps()
        self._layers = nn.ModuleList(
            Layer(name, LiteAttention(max_batch_size=max_batch_size, policy=policy), streams, steps)
            for name in chosen.values()
        )
        share_room(self)  # they are no parts of the model
        # In a tuple, so that the model does not become a part of this module.
        self._modules_in = (*chosen, *around)
        # Where among them the model is, unless it is a mere list of modules.
        self._whole = self._modules_in.index(model) if model in self._modules_in else None
        self._stand_ins: list[functools.partial[Any] | None] = [None] * len(self._modules_in)
        self._streams = streams
        self._steps = steps
        self._depth = 0
        self.entered = False

    @property
    def layers(self) -> dict[str, LiteAttention]:
        """The attention of each chosen module, by the module's name."""
        return {layer.name: layer.attention for layer in self._each()}

    def _each(self) -> list[Layer]:
        return cast("list[Layer]", list(self._layers))

    def reset(self) -> None:
        """Forget what was dropped. Call it whenever a new video starts."""
        for layer in self._each():
            layer.start_over()

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold of every layer; see :meth:`lite_attention.LiteAttention.set_threshold`."""
        for layer in self._each():
            layer.attention.set_threshold(threshold)

    def skip_fraction(self, stream: int = 0) -> Tensor:
        """Share of tiles that each layer will skip in its next pass: fp32 ``[layers]``, without waiting.

        ``stream``: of the how-many-th call, from 0, that is taken over of the layer in one call of the model. A layer
        that has made no such call skips 0, and so does one whose calls are torch's until :meth:`reset`.
        """
        branch = resolved_branch(None, "LiteSDPA")
        stream = checked_int("LiteSDPA: stream", stream, lowest=0)
        if stream > 0 and all(stream >= len(layer.maps(branch)) for layer in self._each()):
            raise RuntimeError(f"LiteSDPA: no layer has made call {stream} of a step in branch {branch} yet")
        return torch.stack([layer.skip_fraction(stream, branch) for layer in self._each()])

    def branch_of(self, stream: int, branch: int | None = None, *, layer: str | None = None) -> int:
        """Under which branch a layer's :class:`lite_attention.LiteAttention` keeps the map of a stream. Waits.

        Args:
            stream: the how-many-th call, from 0, that is taken over of the layer in one call of the model.
            branch: the guidance branch; None for the one of :class:`lite_attention.skip_branch`, or 0.
            layer: the name of the layer; None if all that have made such a call keep its map under one branch.

        Raises:
            TypeError, ValueError: ``stream`` or ``branch`` is no such number, ``layer`` no layer's name, or needed.
            RuntimeError: there was no such call.
        """
        branch = resolved_branch(branch, "LiteSDPA")
        stream = checked_int("LiteSDPA: stream", stream, lowest=0)
        maps = {layer.name: layer.maps_in_use(branch) for layer in self._each()}
        numbers = {name: numbers[stream] for name, numbers in maps.items() if stream < len(numbers)}
        if layer is not None:
            if layer not in self.layers:
                raise ValueError(f"LiteSDPA: layer is {layer!r}, expected one of {list(self.layers)}")
            numbers = {name: number for name, number in numbers.items() if name == layer}
        if len(set(numbers.values())) > 1:
            raise ValueError(
                f"LiteSDPA: layer is None, expected one of {list(numbers)}: these keep the map of call {stream} of a "
                f"step in branch {branch} under different branches"
            )
        if not numbers and stream > 0:
            call = f"call {stream} of a step in branch {branch} yet"
            raise RuntimeError(f"LiteSDPA: {f'{layer} has not' if layer else 'no layer has'} made {call}")
        return next(iter(numbers.values()), branch)

    @property
    def left_to_torch(self) -> dict[str, dict[str, int]]:
        """For each chosen module by name, how many of its calls stayed torch's, by the reason.

        Compiled code counts what it was compiled for once, for the first of the layers that it serves.
        """
        return {layer.name: dict(layer.left_to_torch) for layer in self._each()}

    def summary(self) -> str:
        """For people, a line a layer: what it skips, in each stream, and what of it stayed torch's. Waits."""
        return "\n".join(f"{layer.name or 'the model itself'}: {layer.summary()}" for layer in self._each())

    def __enter__(self) -> LiteSDPA:
        self._depth += 1
        if self._depth == 1:
            for index, module in enumerate(self._modules_in):
                put(module, self._stand_in(index, module))
            self.entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._depth == 0:
            raise RuntimeError("LiteSDPA: left where it was not entered, expected it to be left as often as entered")
        self._depth -= 1
        if self._depth == 0:
            self.entered = False
            for module, routed in zip(self._modules_in, self._stand_ins, strict=True):
                assert routed is not None
                take_away(module, routed, f"LiteSDPA: {type(module).__name__}")

    def _stand_in(self, index: int, module: nn.Module) -> functools.partial[Any]:
        """The function that takes the place of the module's forward: the same at every entry, for torch.compile."""
        routed = self._stand_ins[index]
        if routed is None or (not stands(module, routed) and routed.args[0] != module.forward):
            layer = [self._layers[index]] if index < len(self._layers) else []
            whole = index == self._whole
            routed = stand_in(_routed_forward if layer else _forward_around, module, self, whole, *layer)
            self._stand_ins[index] = routed
        return routed

    def _end_step(self, number: int) -> None:
        for branch in range(MAX_BRANCHES):
            self._end_branch(number, branch)

    def _end_branch(self, number: int, branch: int) -> None:
        if self._steps.are_traced:
            for layer in self._each():
                if layer.calls[number][branch]:
                    layer.end_traced_step(len(layer.calls[number][branch]), branch)
            return
        mixed = [layer for layer in self._each() if layer.end_step(len(layer.calls[number][branch]), branch)]
        if mixed:
            _logger.warning(
                "LiteSDPA: %s made %d attention calls in a step of branch %d, and %d in those before: it cannot be "
                "told which is which, so all are torch's until reset()%s",
                mixed[0].name or "the model itself",
                len(mixed[0].calls[number][branch]),
                branch,
                mixed[0].usual[branch],
                f"; and so for {len(mixed) - 1} other modules" if len(mixed) > 1 else "",
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is pickled, is in no model yet."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state | {"_depth": 0, "entered": False, "_stand_ins": [None] * len(self._modules_in)}


def _find(model: nn.Module, layers: str) -> tuple[dict[nn.Module, str], list[nn.Module]]:
    """The chosen modules with their names, and the modules around them: whose call is a call of several of them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"LiteSDPA: model has type {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(layers, str):
        raise TypeError(f"LiteSDPA: layers has type {type(layers).__name__}, expected a regular expression")
    try:
        pattern = re.compile(layers)
    except re.error as error:
        raise ValueError(f"LiteSDPA: layers is {layers!r}, expected a regular expression: {error}") from None
    # Under all its names, as any of them may be the one that is meant.
    modules = dict(model.named_modules(remove_duplicate=False))
    named = {name: module for name, module in modules.items() if pattern.fullmatch(name)}
    if not named:
        raise ValueError(
            f"LiteSDPA: layers is {layers}, expected to match the name of a module of the {type(model).__name__}"
        )
    chosen: dict[nn.Module, str] = {}
    for name, module in named.items():
        if _is_called(module):
            chosen.setdefault(module, name)
    if not chosen:
        name, module = next(iter(named.items()))
        raise ValueError(
            f"LiteSDPA: layers is {layers}, which matches {name}, a {type(module).__name__} that is never called, "
            "expected modules whose forward makes the call"
        )
    around: dict[nn.Module, None] = {}
    for name, module in modules.items():
        if module in chosen:
            parts = name.split(".") if name else []
            for depth in range(len(parts)):
                outer = modules[".".join(parts[:depth])]
                if outer not in chosen and _is_called(outer):
                    around[outer] = None
    return chosen, list(around)


# What a function returns at once whose body runs later.
_LATER = (GeneratorType, CoroutineType, AsyncGeneratorType)


def _is_called(module: nn.Module) -> bool:
    """Whether it has a forward, which lists of modules have not."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _forward_around(below: Forward, door: LiteSDPA, whole: bool, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module around chosen ones, or of the whole model: a step if the thread is in none yet."""
    if not door.entered:
        return below(*args, **kwargs)
    number = door._steps.current
    inside = UnderWay(door, door._steps.next_number(whole)) if number is None else TakenBack(door, number)
    with inside:
        out = below(*args, **kwargs)
    if number is None and isinstance(out, _LATER):
        raise _later("the model" if whole else "a module around chosen ones", out)
    return out


def _routed_forward(below: Forward, door: LiteSDPA, whole: bool, layer: Layer, *args: Any, **kwargs: Any) -> Any:
    """The forward of a chosen module."""
    if not door.entered:
        return below(*args, **kwargs)
    steps = door._steps
    if not whole and door._whole is not None and steps.current is None and steps.next_number(whole) != FOREIGN:
        layer.say_alone()
    with route_sdpa(functools.partial(_attend, layer)):
        out = _forward_around(below, door, whole, *args, **kwargs)
    if isinstance(out, _LATER):
        raise _later(layer.name or "the model itself", out)
    return out


def _later(where: str, out: Any) -> TypeError:
    """What is raised for a forward whose body runs after it has returned."""
    if not isinstance(out, AsyncGeneratorType):
        out.close()
    return TypeError(
        f"LiteSDPA: the forward of {where} returned a {type(out).__name__}, whose attention calls are made later, when "
        "it cannot be told which step they are of; expected one that makes them before it returns"
    )


def _attend(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Handler of one call; tensors ``[B, H, S, D]``."""
    attention = layer.attention
    branch = resolved_branch(None, "LiteSDPA")
    number = layer.steps.current
    assert number is not None  # this is inside of the module's forward
    may_use = layer.steps.may_use(number, branch)
    reason = why_left_to_torch(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention.max_batch_size
    )
    if reason is None:
        mode = foreign_function_mode()
        reason = None if mode is None else FOREIGN_MODE + mode
    if reason is None and not may_use:
        reason = SHARED
    if reason is None and layer.mixed[branch]:
        reason = MIXED
    calls = () if number == FOREIGN else layer.calls[number][branch]
    if reason is not None:
        layer.note(reason)
        out = unrouted_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    else:
        place = layer.branch_of(len(calls), branch)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = attention(q, k, v, scale, branch=place).transpose(1, 2)
        layer.has_map[place].up = True
    if number != FOREIGN:
        layer.calls[number][branch] = (*calls, None)  # one that failed is not counted
    return out
