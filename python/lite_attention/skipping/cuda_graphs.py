"""A whole denoising step as one CUDA graph: recorded once, then launched by a single call.

The graph holds kernels and addresses, no Python. What it computes therefore follows every tensor that is written in
place, skip state, thresholds and generation clock among them, and nothing else. :class:`CapturedStep` checks before
each launch what it can of the rest, and refuses a call that the graph would answer wrongly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from lite_attention.ops import backward_pass
from lite_attention.ops.checks import checked_int
from lite_attention.ops.modes import ordinary_tensors
from lite_attention.ops.own_state import OwnState, held_states, state_buffers
from lite_attention.skipping.branches import resolved_branch
from lite_attention.skipping.state import SkipState

__all__ = ["CapturedStep", "capture_step"]

Result = TypeVar("Result")

# What a step may return beside tensors: values that a replay cannot change.
_CONSTANTS = (bool, int, float, str, type(None))


class _Graph(Protocol):
    """The part of ``torch.cuda.CUDAGraph`` that a captured step needs."""

    def replay(self) -> None: ...

    def pool(self) -> tuple[int, int]: ...


class CapturedStep(Generic[Result]):
    """A denoising step in a CUDA graph; made by :func:`capture_step`.

    Call it as the step itself. The inputs are copied to where the graph reads them, the graph is launched on the
    current stream, and copies of its outputs are returned, which the next call does not touch. Nothing waits for the
    device. Calls on several streams must not overlap.
    """

    def __init__(
        self,
        graph: _Graph,
        arguments: _StaticArguments,
        outputs: Result,
        states: dict[str, OwnState],
        read_by_graph: object,
    ) -> None:
        self._graph = graph
        self._arguments = arguments
        self._read_by_graph = read_by_graph  # held so that its memory is not freed
        self._outputs, self._output_structure = _checked_outputs(outputs)
        self._layouts = [(name, state, state.layout) for name, state in states.items()]
        self._branch = resolved_branch(None, "capture_step")

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """Run the step on new inputs.

        Args:
            args, kwargs: as given to :func:`capture_step`. Tensors of the same shape, dtype and device, other values
                the same.

        Returns:
            What the step returned, in new tensors.

        Raises:
            TypeError, ValueError: an argument is not as it was at the capture; the text names it.
            RuntimeError: a layer's state moved or changed its layout, another ``skip_branch`` is on than at the
                capture, another capture is open, or a backward pass runs the step again.
        """
        _refuse_open_capture("CapturedStep")
        if backward_pass.running:
            backward_pass.refuse("CapturedStep")
        for name, state, layout in self._layouts:
            if state.layout != layout:
                raise RuntimeError(
                    f"CapturedStep: {name} has layout version {state.layout}, expected {layout}, "
                    "the one captured: its state moved or made room for another shape, skipping was switched on or "
                    "off, or its threshold changed between one number and one per head. Capture the step again"
                )
        branch = resolved_branch(None, "CapturedStep")
        if branch != self._branch:
            raise RuntimeError(
                f"CapturedStep: called in skip_branch({branch}), expected {self._branch}, the branch of the capture. "
                "Capture one step for each branch, or one that runs both"
            )
        self._arguments.copy_from(args, kwargs)
        self._graph.replay()
        results = [output.clone() if isinstance(output, Tensor) else output for output in self._outputs]
        return pytree.tree_unflatten(results, self._output_structure)  # type: ignore[no-any-return]

    @property
    def pool(self) -> tuple[int, int]:
        """The graph's memory pool. Steps captured with it as ``pool`` share that memory; they may run in any order."""
        return self._graph.pool()


def capture_step(
    step: Callable[..., Result],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    modules: nn.Module | Sequence[nn.Module] | None = None,
    warmup_calls: int = 2,
    pool: tuple[int, int] | None = None,
) -> CapturedStep[Result]:
    """Capture one denoising step in a CUDA graph.

    ``step`` is first called a few times, so that everything that is made on first use exists, and every buffer of
    ``modules`` is then set back to what it was: skip state and generation clocks do not notice. Maps that had to be
    allocated count as never written.

    Between calls of the result may change: whatever is written in place. That is the values of the input tensors, skip
    state and resets, thresholds (one number stays one number), must-do ranges given as tensors, generation clocks,
    weights. Everything else is as it was at the capture, whether or not a later call can notice: shapes, numbers and
    ranges given as Python values, hooks, adapters, where the weights are. Capture again after changing those.

    Args:
        step: a transformer, or a function that runs one or more passes; on one CUDA device, returning tensors, numbers
            or None, possibly nested. It neither waits for the device nor writes its inputs in place. May be compiled,
            in a mode without CUDA graphs of its own. Runs under ``torch.no_grad()``.
        args, kwargs: an example of its inputs: tensors on that device and other values, nested in lists, tuples and
            dicts.
        modules: the modules that ``step`` runs; None for ``step`` itself.
        warmup_calls: how often to call ``step`` first, at least once.
        pool: memory to share, the ``pool`` of another captured step; None for its own.

    Raises:
        TypeError, ValueError: an argument is not what it should be; the text names it.
        RuntimeError: there is no CUDA device, another capture is open, autocast would cache casts, or ``step`` does
            something that a graph cannot repeat.
    """
    if not callable(step):
        raise TypeError(f"capture_step: step has type {type(step).__name__}, expected a module or function")
    checked_int("capture_step: warmup_calls", warmup_calls, lowest=1)
    roots = _named_roots(step, modules)
    states = _states(roots)
    if not any(isinstance(state, SkipState) for state in states.values()):
        raise ValueError(
            "capture_step: modules hold no LiteAttention layer, expected the transformers that step runs, with "
            "LiteAttention in them"
        )
    _refuse_open_capture("capture_step")
    _refuse_cached_casts()
    arguments = _StaticArguments(args, kwargs or {})
    _check_device(arguments.device)

    graph = torch.cuda.CUDAGraph()
    static_args, static_kwargs = arguments.values()
    with torch.no_grad(), _side_stream(arguments.device) as stream:
        with _unchanged_buffers(roots):
            for _ in range(warmup_calls):
                step(*static_args, **static_kwargs)
        before = _buffers(roots)
        with torch.cuda.graph(graph, pool=pool, stream=stream):  # type: ignore[arg-type]
            outputs = step(*static_args, **static_kwargs)
    _refuse_replaced_buffers(before, _buffers(roots))
    arguments.refuse_writes()
    return CapturedStep(graph, arguments, outputs, states, read_by_graph=(step, before, _parameters(roots)))


class _StaticArguments:
    """The arguments that a graph was captured with: its tensors at fixed addresses, and what a call must give."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        paths, leaves, self._structure = _flatten(args, kwargs)
        self._names = [_argument_name(path) for path in paths]
        tensors = {name: leaf for name, leaf in zip(self._names, leaves, strict=True) if isinstance(leaf, Tensor)}
        if not tensors:
            raise ValueError("capture_step: args and kwargs hold no tensor, expected the inputs of step")
        first = next(iter(tensors))
        self.device = tensors[first].device
        for name, tensor in tensors.items():
            if tensor.device != self.device:
                raise ValueError(f"capture_step: {name} is on {tensor.device}, expected {self.device}, as {first} is")
            _refuse_gradient("capture_step", name, tensor)
        with ordinary_tensors(), torch.no_grad():
            self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._versions = {name: tensor._version for name, tensor in self._tensors()}

    def values(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments themselves, positional and keyword, to call the step with."""
        return pytree.tree_unflatten(self._leaves, self._structure)  # type: ignore[no-any-return]

    def copy_from(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check a call's arguments, and only if all fit write them over those of the capture."""
        leaves, structure = pytree.tree_flatten(_tree(args, kwargs))
        if structure != self._structure:
            raise self._structure_error(args, kwargs)
        pairs = []
        for name, static, leaf in zip(self._names, self._leaves, leaves, strict=True):
            if isinstance(static, Tensor):
                if (
                    not isinstance(leaf, Tensor)
                    or leaf.shape != static.shape
                    or leaf.dtype != static.dtype
                    or leaf.device != static.device
                ):
                    raise ValueError(
                        f"CapturedStep: {name} is {_described(leaf)}, expected {_described(static)}, as captured. "
                        "Other inputs need a captured step of their own"
                    )
                _refuse_gradient("CapturedStep", name, leaf)
                pairs.append((static, leaf))
            elif leaf is not static and (type(leaf) is not type(static) or leaf != static):
                raise ValueError(
                    f"CapturedStep: {name} is {_described(leaf)}, expected {_described(static)}, as captured. What "
                    "changes from call to call must be a tensor"
                )
        for static, leaf in pairs:
            static.copy_(leaf)

    def refuse_writes(self) -> None:
        """Raise if the step wrote one of the arguments, which a replay would not do to the caller's tensor."""
        for name, tensor in self._tensors():
            if tensor._version != self._versions[name]:
                raise RuntimeError(
                    f"capture_step: step writes {name} in place, expected it to return what it computes: a replay "
                    "works on copies"
                )

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return (pair for pair in zip(self._names, self._leaves, strict=True) if isinstance(pair[1], Tensor))

    def _structure_error(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ValueError:
        names = [_argument_name(path) for path in _flatten(args, kwargs)[0]]
        expected = ", ".join(self._names)
        for name in self._names:
            if name not in names:
                return ValueError(f"CapturedStep: {name} is missing, expected {expected}, as captured")
        for name in names:
            if name not in self._names:
                return ValueError(f"CapturedStep: {name} is given, expected only {expected}, as captured")
        return ValueError("CapturedStep: the arguments are in other lists, tuples or dicts, expected those captured")


def _tree(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Keyword arguments mean the same in any order.
    return tuple(args), dict(sorted(kwargs.items()))


def _flatten(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[pytree.KeyPath], list[Any], pytree.TreeSpec]:
    pairs, structure = pytree.tree_flatten_with_path(_tree(args, kwargs))
    return [path for path, _ in pairs], [leaf for _, leaf in pairs], structure


def _argument_name(path: pytree.KeyPath) -> str:
    positional_or_keyword, argument, *inside = path
    is_positional = positional_or_keyword == pytree.SequenceKey(0)
    return (f"args{argument}" if is_positional else argument.key) + pytree.keystr(tuple(inside))  # type: ignore[attr-defined]


def _described(leaf: Any) -> str:
    return f"{list(leaf.shape)} of {leaf.dtype} on {leaf.device}" if isinstance(leaf, Tensor) else repr(leaf)


def _checked_outputs(outputs: Any) -> tuple[list[Any], pytree.TreeSpec]:
    leaves, structure = pytree.tree_flatten(outputs)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_CONSTANTS)):
            raise TypeError(
                f"capture_step: step returned something of type {type(leaf).__name__}, expected tensors, numbers, "
                "strings or None, possibly in lists, tuples and dicts"
            )
    return leaves, structure


def _named_roots(step: Callable[..., Any], modules: nn.Module | Sequence[nn.Module] | None) -> dict[str, nn.Module]:
    """The modules that the caller names, by what the names of their parts begin with in errors."""
    if modules is None:
        if not isinstance(step, nn.Module):
            raise ValueError("capture_step: modules is None, expected the modules that step runs, as step is not one")
        modules = step
    if isinstance(modules, nn.Module):
        return {type(modules).__name__: modules}
    if not isinstance(modules, Sequence):
        raise TypeError(f"capture_step: modules has type {type(modules).__name__}, expected a module or a list of them")
    for index, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"capture_step: modules[{index}] has type {type(module).__name__}, expected a module")
    return {f"modules[{index}]": module for index, module in enumerate(modules)}


def _states(roots: dict[str, nn.Module]) -> dict[str, OwnState]:
    """What layers and clocks remember, by the names of these."""
    return {held.owner_name: held.state for prefix, root in roots.items() for held in held_states(root, prefix)}


def _buffers(roots: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Of the modules, and of what they keep to themselves."""
    found: dict[str, Tensor] = {}
    for prefix, root in roots.items():
        found.update(root.named_buffers(prefix))
        found.update(state_buffers(root, prefix))
    return found


def _parameters(roots: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {name: parameter for prefix, root in roots.items() for name, parameter in root.named_parameters(prefix)}


@contextmanager
def _unchanged_buffers(roots: dict[str, nn.Module]) -> Iterator[None]:
    """Buffers have at the end the values that they had at the start.

    A buffer that was replaced by one of another shape is new room for a map. It counts as never written, because the
    stamps, which say whose map it holds, keep their shape and are set back.
    """
    # Some may be inference tensors, which can be written in this mode alone.
    with torch.inference_mode():
        before = {name: buffer.clone() for name, buffer in _buffers(roots).items()}
    try:
        yield
    finally:
        with torch.inference_mode():
            for name, buffer in _buffers(roots).items():
                if name in before and before[name].shape == buffer.shape:
                    buffer.copy_(before[name])


def _refuse_replaced_buffers(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for name, buffer in after.items():
        if buffer is not before.get(name):
            raise RuntimeError(
                f"capture_step: step replaced {name} while it was captured, expected it to be written in "
                "place. A LiteAttention layer does so where one step uses it with more branches and shapes than it has "
                "room for"
            )


def _refuse_gradient(function: str, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{function}: {name} requires a gradient, expected none: the step is forward-only. Detach it, or call "
            "under torch.no_grad()"
        )


def _refuse_cached_casts() -> None:
    if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
        raise RuntimeError(
            "capture_step: autocast is on and caches what it casts, which the graph would read after it is freed; "
            "expected autocast inside step, or with cache_enabled=False"
        )


def _check_device(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("capture_step: torch sees no CUDA device, expected the one that step runs on")
    if device.type != "cuda":
        raise ValueError(f"capture_step: the inputs are on {device}, expected a CUDA device")


def _refuse_open_capture(function: str) -> None:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{function}: the current stream is being captured already, expected no open capture")


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures of a device: cuBLAS keeps a workspace for each stream it has seen."""
    return torch.cuda.Stream(device)


@contextmanager
def _side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Graphs are captured on a stream of their own, after what was launched before and before what follows."""
    stream, outer = _capture_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield stream
    finally:
        outer.wait_stream(stream)
