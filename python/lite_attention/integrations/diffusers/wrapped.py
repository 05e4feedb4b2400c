"""Methods put on objects of someone else, in place of those that are there and with them inside.

Objects of classes that are found by name, and no closures: a model that carries them can be pickled and copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import CodeType, MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lite_attention.integrations.diffusers import _internals
from lite_attention.integrations.diffusers.generation import Generation
from lite_attention.integrations.diffusers.guidance import BranchNames, named_branch

__all__ = ["NamedContext", "Replaced", "TickingForward"]


class Replaced:
    """Methods put on an object, and how to take them off again."""

    def __init__(self, owner: object, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._owner, self._methods = owner, methods
        self._before = {name: vars(owner).get(name) for name in methods}
        vars(owner).update(methods)

    def restore(self) -> None:
        """Take off those that are still there."""
        present = vars(self._owner)
        for name, method in self._methods.items():
            if present.get(name) is not method:
                continue  # replaced or wrapped by someone else since then, whose it is now
            if self._before[name] is None:
                del present[name]
            else:
                present[name] = self._before[name]


class _Wrapped:
    """A method in place of one that an object has.

    Args:
        owner: whose method it is.
        method: its name in the class.
        slot: its name in the object, None for the same.
    """

    def __init__(self, owner: object, method: str, slot: str | None = None) -> None:
        self._owner, self._method = owner, method
        present = getattr(owner, slot or method)
        # The class's own is looked up in each call: it may be replaced there later (as TeaCache does). A bound method
        # would also be pickled as the name under which this is found.
        is_own = getattr(present, "__func__", None) is getattr(type(owner), method, None)
        self._present = None if is_own else present
        self._looked_up: Callable[..., Any] | None = None
        self.look_up_again()

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """Call what the object has without this."""
        if self._present is not None:
            return self._present(*args, **kwargs)
        if self._looked_up is not None and torch.compiler.is_dynamo_compiling():
            return self._looked_up(self._owner, *args, **kwargs)
        return getattr(type(self._owner), self._method)(self._owner, *args, **kwargs)

    def look_up_again(self) -> None:
        """Note the class's method, where torch.compile cannot look it up in each call and guard on it."""
        if self._present is None and _internals.is_opaque_to_compile(type(self._owner)):
            self._looked_up = getattr(type(self._owner), self._method)

    def put_back(self) -> None:
        """Take this off where it stands under the name that it has in the class."""
        if self._present is None:
            del vars(self._owner)[self._method]
        else:
            vars(self._owner)[self._method] = self._present

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # where inspect.signature looks
        if self._present is None:
            return MethodType(getattr(type(self._owner), self._method), self._owner)
        present: Callable[..., Any] = self._present
        return present

    @property
    def __code__(self) -> CodeType:  # where torch.export looks for the file and the line of a forward
        return type(self).__call__.__code__


class Timed(Protocol):
    """A transformer whose forward tells its layers the time."""

    transformer: nn.Module
    generation: Generation
    is_enabled: bool
    """False once it was given back: what others have wrapped of this stays, and does nothing."""
    timestep_position: int
    """Of the timestep among the arguments of its forward."""
    text_position: int | None
    """Of the text that its layers attend to, None where it takes none."""
    ticking: TickingForward
    """Of the forwards that it was given, the one that ticks."""

    def begin_named_call(self) -> None:
        """Do what is to be done before a call whose branch has a name."""
        ...

    def look_at_schedule(self) -> None:
        """Begin a generation where the pipeline's scheduler tells of one, in plain Python."""
        ...


class TickingForward(_Wrapped):
    """A transformer's forward, which tells its layers the time.

    Part of the forward and not a hook before it, so that one graph holds both.

    Args:
        patched: the transformer. Of several in one forward, only the latest that it was given ticks.
        slot: the name of the forward in the transformer.
    """

    def __init__(self, patched: Timed, slot: str) -> None:
        super().__init__(patched.transformer, "forward", slot)
        self.patched = patched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        patched = self.patched
        if patched.ticking is not self or not patched.is_enabled:
            return self.inner(*args, **kwargs)
        patched.look_at_schedule()
        generation = patched.generation
        timestep = _argument(args, kwargs, patched.timestep_position, "timestep")
        text = _argument(args, kwargs, patched.text_position, "encoder_hidden_states")
        generation.tick(timestep, text if isinstance(text, Tensor) else None, type(self._owner).__name__)
        generation.call.is_running = True
        # Dynamo does not break graphs inside of try. Without one, an error after such a break leaves the note standing
        # until the next call: a forward that is put in this one's place in between would not be refused.
        if torch.compiler.is_dynamo_compiling():
            out = self.inner(*args, **kwargs)
            generation.call.is_running = False
            return out
        try:
            return self.inner(*args, **kwargs)
        finally:
            generation.call.is_running = False


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int | None, name: str) -> Any:
    """What a forward was given at this position or by this name, or None."""
    return args[position] if position is not None and len(args) > position else kwargs.get(name)


class NamedContext(_Wrapped):
    """A transformer's cache_context, in which pipelines call each guidance branch: it chooses the skip state too.

    It also tells the time by the steps of the pipeline's scheduler, which may take two at one timestep.
    """

    def __init__(self, patched: Timed, branches: BranchNames) -> None:
        super().__init__(patched.transformer, "cache_context")
        self._patched, self._branches = patched, branches

    def __call__(self, name: str, **kwargs: object) -> AbstractContextManager[None]:
        return self._entered(name, **kwargs)

    @contextmanager
    def _entered(self, name: str, **kwargs: object) -> Iterator[None]:
        patched = self._patched
        if not patched.is_enabled:
            with self.inner(name, **kwargs):
                yield
            return
        patched.begin_named_call()
        with named_branch(self._branches.number(name)), self.inner(name, **kwargs):
            yield
