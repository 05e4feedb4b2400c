"""LiteAttention in any model that calls ``torch.nn.functional.scaled_dot_product_attention``.

For models without a door of their own. The skip state belongs to the module that makes the call, whatever the order of
calls is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lite_attention.integrations._routing import reason_to_refuse, route_sdpa
from lite_attention.skipping.arguments import Threshold
from lite_attention.skipping.module import LiteAttention
from lite_attention.skipping.policy import SkipPolicy
from lite_attention.skipping.state import share_room

__all__ = ["LiteSDPA"]


class LiteSDPA(nn.Module):
    """Context manager: self-attention calls of chosen modules skip what earlier passes found negligible.

    Inside it, a call of ``scaled_dot_product_attention`` made in the forward of a chosen module goes to that module's
    own :class:`lite_attention.LiteAttention`, if it is video self-attention: as many keys as queries, no mask, not
    causal, no dropout. Every other call stays torch's. It may be entered and left as often as one likes; the state
    stays. Guidance branches are chosen with :class:`lite_attention.skip_branch`.

    Args:
        model: the model that the modules belong to. It is changed only inside the context.
        layers: regular expression that matches the whole name (as in ``model.named_modules()``) of each module to take
            over. Each may make one such call in a forward.
        threshold, max_batch_size, policy: as for :class:`lite_attention.LiteAttention`.

    Raises:
        ValueError: no module has such a name.
        RuntimeError: in a forward: a module makes several such calls.
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
        chosen = {name: module for name, module in model.named_modules() if re.fullmatch(layers, name)}
        if not chosen:
            raise ValueError(
                f"LiteSDPA: layers is {layers}, expected to match the name of a module of the {type(model).__name__}"
            )
        self._attention = nn.ModuleList(LiteAttention(max_batch_size=max_batch_size, policy=policy) for _ in chosen)
        share_room(self)  # they are no parts of the model
        self.layers: dict[str, LiteAttention] = dict(zip(chosen, self._attention, strict=True))  # type: ignore[arg-type]
        """The attention of each chosen module, by the module's name."""
        # In a tuple, so that the model does not become a part of this module.
        self._chosen = tuple(chosen.values())
        self._depth = 0
        self._own_forwards: list[Callable[..., Any] | None] = [None] * len(chosen)
        self._routed_forwards: list[functools.partial[Any] | None] = [None] * len(chosen)

    def reset(self) -> None:
        """Forget what was dropped. Call it whenever a new video starts."""
        for layer in self.layers.values():
            layer.reset_skip_state()

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold of every layer; see :meth:`lite_attention.LiteAttention.set_threshold`."""
        for layer in self.layers.values():
            layer.set_threshold(threshold)

    def skip_fraction(self) -> Tensor:
        """Share of tiles that each layer will skip in its next pass: fp32 ``[layers]``, without waiting."""
        return torch.stack([layer.skip_fraction() for layer in self.layers.values()])

    def __enter__(self) -> LiteSDPA:
        self._depth += 1
        if self._depth == 1:
            for index, module in enumerate(self._chosen):
                self._own_forwards[index] = vars(module).get("forward")
                vars(module)["forward"] = self._routed(index, module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for module, forward in zip(self._chosen, self._own_forwards, strict=True):
                if forward is None:
                    del vars(module)["forward"]
                else:
                    vars(module)["forward"] = forward

    def _routed(self, index: int, module: nn.Module) -> functools.partial[Any]:
        """The function that takes the place of the module's forward: the same at every entry, for torch.compile."""
        routed = self._routed_forwards[index]
        if routed is None or routed.args[0] != module.forward:
            attention: Any = self._attention[index]
            routed = functools.partial(_routed_forward, module.forward, self, attention)
            functools.update_wrapper(routed, module.forward)
            self._routed_forwards[index] = routed
        return routed


def _routed_forward(
    forward: Callable[..., Any], owner: LiteSDPA, attention: LiteAttention, *args: Any, **kwargs: Any
) -> Any:
    """The forward of a chosen module."""
    calls: list[LiteAttention] = []
    with route_sdpa(functools.partial(_attend, owner, attention, calls)):
        return forward(*args, **kwargs)


def _attend(
    owner: LiteSDPA,
    attention: LiteAttention,
    calls: list[LiteAttention],
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
    takes_over = attn_mask is None and query.dim() == 4 and reason_to_refuse(query, key, dropout_p, is_causal) is None
    if not takes_over:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    calls.append(attention)
    if len(calls) > 1:
        name = next(name for name, layer in owner.layers.items() if layer is attention)
        raise RuntimeError(
            f"LiteSDPA: {name or 'the model itself'} makes several self-attention calls in one forward, expected one, "
            "to which its skip state belongs. Name its submodules in layers"
        )
    out: Tensor = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale)
    return out.transpose(1, 2)
