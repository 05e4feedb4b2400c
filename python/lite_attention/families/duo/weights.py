"""Weights of a model, reordered so that the full heads of each layer come first and its streaming heads last.

Plain torch modules are walked here, whoever's model they make up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lite_attention.ops.checks import checked_int

__all__ = [
    "HEAD_ORDER",
    "HEAD_WINDOWS",
    "HeadTable",
    "attention_layers",
    "head_table",
    "reorder_weights",
    "restore_weights",
]

# Attributes of an attention module, plain tensors and no buffers: what is made of a buffer in a model that is loaded,
# sharded or cast is not in our hands. The original number of each of its query heads, int64 [KV heads, query heads of
# each], on the CPU.
HEAD_ORDER = "duo_head_order"
# What its query heads see, int32 [query heads, 2]: see lite_attention.families.streaming.head_windows.
HEAD_WINDOWS = "duo_head_windows"

# Refuses weights of another order, as long as there is an order.
_LOAD_HOOK = "duo_load_hook"

HeadTable = Tensor | Sequence[Sequence[int]]


@torch.no_grad()
def reorder_weights(
    model: nn.Module,
    full_attention_heads: HeadTable,
    *,
    num_attention_heads: int,
    num_key_value_heads: int,
    hidden_size: int,
    device: torch.device | str | None = None,
) -> list[int]:
    """Move the full heads of each layer before its streaming heads, in place; the model computes what it did.

    The heads keep their order within each class, and the query heads of a KV head move with it. What is permuted are
    the rows of the query, key and value projections and of norms over all heads, biases included, and the columns of
    the output projection, and their gradients. What an optimizer has gathered stays: make it afterwards. The
    permutation stays with the attention modules (an attribute that is not saved), which refuse load_state_dict, as
    their parts do, until :func:`restore_weights`. Save restored weights: nobody could tell the order of others.

    Args:
        model: has ``model.model.layers`` or ``model.layers``, each with a ``self_attn`` of ``q_proj``, ``k_proj`` and
            ``v_proj`` or a fused ``qkv_proj`` (queries, keys, values), and ``o_proj``.
        full_attention_heads: ``[layers, KV heads]`` of 1 for full heads and 0 for streaming ones.
        num_attention_heads: query heads of a layer.
        num_key_value_heads: KV heads of a layer.
        hidden_size: width of the model, which the projections read. The head dim is taken from the weights.
        device: where the weights are expected to be; None for wherever they are.

    Returns:
        How many query heads of each layer are full: its first ones.

    Raises:
        TypeError, ValueError: an argument does not fit the model or the weights are not plain floating-point ones; the
            text names it. The model is then unchanged.
        RuntimeError: the weights are reordered already, or DuoAttention is enabled in the model.
        ValueError: a layer or a weight occurs twice. The model is then unchanged.
    """
    caller = "duo.reorder_weights"
    for what, number in (
        ("num_attention_heads", num_attention_heads),
        ("num_key_value_heads", num_key_value_heads),
        ("hidden_size", hidden_size),
    ):
        checked_int(f"{caller}: {what}", number, lowest=1)
    layers = attention_layers(caller, model)
    table = head_table(caller, full_attention_heads, len(layers), num_key_value_heads)
    if num_attention_heads % num_key_value_heads != 0:
        raise ValueError(
            f"{caller}: num_attention_heads is {num_attention_heads}, expected a multiple of num_key_value_heads, "
            f"{num_key_value_heads}"
        )
    for name, attention in layers.items():
        _refuse_enabled(caller, name, attention)
        if hasattr(attention, HEAD_ORDER):
            raise RuntimeError(
                f"{caller}: the weights of {name} are reordered already, expected the original ones: call "
                "duo.restore_weights first"
            )
    query_heads = torch.arange(num_attention_heads).view(num_key_value_heads, -1)
    orders = [query_heads[row.argsort(descending=True, stable=True)] for row in table]
    plans = [
        _permutations(f"{caller}: {name}", attention, order, hidden_size, device)
        for (name, attention), order in zip(layers.items(), orders, strict=True)
    ]
    _refuse_shared(caller, model, layers, plans)
    _permute(plans)
    for attention, order in zip(layers.values(), orders, strict=True):
        setattr(attention, HEAD_ORDER, order)
        for part in attention.modules():  # one of them may be loaded alone
            setattr(part, _LOAD_HOOK, part.register_load_state_dict_pre_hook(_refuse_load))
    full: list[int] = (table.sum(-1) * query_heads.shape[1]).tolist()
    return full


@torch.no_grad()
def restore_weights(model: nn.Module) -> None:
    """Undo :func:`reorder_weights`, bit for bit and in place.

    Raises:
        RuntimeError: the weights are not reordered, or DuoAttention is enabled in the model.
        TypeError, ValueError: the weights are no longer what they were, or shared now; the model is then unchanged.
    """
    caller = "duo.restore_weights"
    layers = attention_layers(caller, model)
    plans = []
    for name, attention in layers.items():
        _refuse_enabled(caller, name, attention)
        if not hasattr(attention, HEAD_ORDER):
            raise RuntimeError(
                f"{caller}: the weights of {name} are not reordered, expected duo.reorder_weights before"
            )
        order: Tensor = getattr(attention, HEAD_ORDER)
        group = order.shape[1]
        back = order.flatten().argsort().view(-1, group)
        plans.append(_permutations(f"{caller}: {name}", attention, back, None, None))
    _refuse_shared(caller, model, layers, plans)
    _permute(plans)
    for attention in layers.values():
        delattr(attention, HEAD_ORDER)
        for part in attention.modules():
            if hasattr(part, _LOAD_HOOK):
                getattr(part, _LOAD_HOOK).remove()
                delattr(part, _LOAD_HOOK)


def _refuse_load(part: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    if hasattr(part, _LOAD_HOOK) and any(name.startswith(prefix) for name in state_dict):
        name = prefix.removesuffix(".") or type(part).__name__
        raise RuntimeError(
            f"load_state_dict: the weights of {name} are reordered, and the order of those given cannot be told, "
            "expected duo.restore_weights before, and duo.reorder_weights after"
        )


class _Permutation(NamedTuple):
    """One dimension of a weight, as so many equal blocks in a new order."""

    name: str
    tensor: Tensor
    dim: int
    order: Tensor


def _permute(plans: list[list[_Permutation]]) -> None:
    """All of them or, where one fails, none: a model of which some heads have moved computes something else."""
    todo = [one._replace(order=one.order.to(one.tensor.device)) for plan in plans for one in plan]
    # The memory for the largest weight, before anything moves.
    room: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for one in todo:
        kind = one.tensor.device, one.tensor.dtype
        if kind not in room or room[kind].numel() < one.tensor.numel():
            room[kind] = one.tensor.new_empty(one.tensor.numel())
    done: list[_Permutation] = []
    try:
        for one in todo:
            _permute_one(one, room)
            done.append(one)
    except BaseException:
        for one in done:
            _permute_one(one._replace(order=one.order.argsort()), room)
        raise


def _permute_one(one: _Permutation, room: dict[tuple[torch.device, torch.dtype], Tensor]) -> None:
    _, tensor, dim, order = one
    blocks = tensor.unflatten(dim, (len(order), -1))
    new = room[tensor.device, tensor.dtype][: tensor.numel()].view(blocks.shape)
    torch.index_select(blocks, dim, order, out=new)
    tensor.copy_(new.flatten(dim, dim + 1))


def _permutations(
    where: str, attention: nn.Module, order: Tensor, hidden_size: int | None, device: torch.device | str | None
) -> list[_Permutation]:
    """What brings the heads of one layer into this order, int64 ``[KV heads, query heads of each]``.

    A ``hidden_size`` of None is whatever the weights say. Raises an error where a parameter is not what it should be,
    or is one whose heads are not known.
    """
    queries, keys = order.flatten(), order[:, 0] // order.shape[1]
    parameters = dict(attention.named_parameters())
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    if "qkv_proj.weight" in parameters:
        both = len(queries) + len(keys)
        rows = {"qkv_proj": torch.cat([queries, len(queries) + keys, both + keys])}
    for name in (*rows, "o_proj"):
        if f"{name}.weight" not in parameters:
            raise ValueError(f"{where} has no {name}, expected q_proj, k_proj and v_proj, or qkv_proj, and o_proj")

    first, blocks = next(iter(rows.items()))
    hidden_size = parameters["o_proj.weight"].shape[0] if hidden_size is None else hidden_size
    head_dim = getattr(attention, "head_dim", parameters[f"{first}.weight"].shape[0] // len(blocks))
    layout: dict[str, tuple[list[int], int, Tensor]] = {}  # shape, and the dimension in which the heads lie
    for name, heads in rows.items():
        layout[f"{name}.weight"] = [len(heads) * head_dim, hidden_size], 0, heads
        layout[f"{name}.bias"] = [len(heads) * head_dim], 0, heads
    layout["o_proj.weight"] = [hidden_size, len(queries) * head_dim], 1, queries
    for name, heads in (("q_norm.weight", queries), ("k_norm.weight", keys)):
        layout[name] = [len(heads) * head_dim], 0, heads
    serves_all_heads = {"o_proj.bias": [hidden_size], "q_norm.weight": [head_dim], "k_norm.weight": [head_dim]}

    plan = []
    for name, parameter in parameters.items():
        _check_parameter(f"{where}.{name}", parameter, device)
        shape = list(parameter.shape)
        if shape == serves_all_heads.get(name):
            continue
        if name not in layout:
            raise ValueError(f"{where} has the parameter {name}, expected none whose heads are not known")
        expected, dim, heads = layout[name]
        if shape != expected:
            raise ValueError(
                f"{where}.{name} has shape {shape}, expected {expected} for {len(queries)} query heads, {len(keys)} KV "
                f"heads, head_dim {head_dim} and hidden_size {hidden_size}"
            )
        plan.append(_Permutation(f"{where}.{name}", parameter, dim, heads))
        if parameter.grad is not None:
            plan.append(_Permutation(f"{where}.{name}.grad", parameter.grad, dim, heads))
    return plan


def _refuse_shared(
    caller: str, model: nn.Module, layers: dict[str, nn.Module], plans: list[list[_Permutation]]
) -> None:
    """Raise where something would be permuted twice, or something else with it: told by its memory, not by its name."""
    first: dict[nn.Module, str] = {}
    for name, attention in layers.items():
        if attention in first:
            raise ValueError(
                f"{caller}: {name} is the same module as {first[attention]}, expected one for each layer: its weights "
                "would be permuted twice"
            )
        first[attention] = name
    planned = [(one.name.removeprefix(f"{caller}: "), one.tensor) for plan in plans for one in plan]
    weights = {id(tensor) for _, tensor in planned}
    within = {part for attention in layers.values() for part in attention.modules()}
    others = [
        (f"{prefix}.{name}".removeprefix("."), parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not (module in within and id(parameter) in weights)
    ]
    spans = [
        _Span(*memory, name, permuted)
        for permuted, tensors in ((True, planned), (False, others))
        for name, tensor in tensors
        if (memory := _memory(tensor)) is not None
    ]
    spans.sort()
    furthest = spans[0]
    for span in spans[1:]:
        if span.start < furthest.stop and (span.permuted or furthest.permuted):
            raise ValueError(
                f"{caller}: {furthest.name} and {span.name} share memory, expected weights of their own: permuting "
                "one would scramble the other"
            )
        furthest = max(furthest, span, key=lambda one: one.stop)


class _Span(NamedTuple):
    """Where in memory a weight lies."""

    start: int
    stop: int
    name: str
    permuted: bool


def _memory(tensor: Tensor) -> tuple[int, int] | None:
    """The first byte of a tensor and the one after its last; None where it has none."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return None
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + elements * tensor.element_size()


def _check_parameter(where: str, parameter: nn.Parameter, device: torch.device | str | None) -> None:
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.is_meta:
        raise TypeError(
            f"{where} is a {type(parameter).__name__} of {parameter.dtype} on {parameter.device}, expected a plain "
            "floating-point parameter: reorder before weights are quantised, sharded or offloaded"
        )
    if device is not None:
        expected = torch.device(device)
        if parameter.device.type != expected.type or expected.index not in (None, parameter.device.index):
            raise ValueError(f"{where} is on {parameter.device}, expected {expected}, the device given")


def _refuse_enabled(caller: str, name: str, attention: nn.Module) -> None:
    if hasattr(attention, HEAD_WINDOWS):
        raise RuntimeError(
            f"{caller}: DuoAttention is enabled in {name}, expected it to be off: its table fits the present heads"
        )


def attention_layers(caller: str, model: nn.Module) -> dict[str, nn.Module]:
    """The self-attention module of every decoder layer, by name.

    Raises:
        TypeError: the model has no such modules.
    """
    decoder = getattr(model, "model", model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, Iterable):
        raise TypeError(f"{caller}: {type(model).__name__} has no layers, expected model.layers or model.model.layers")
    found = {}
    for index, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        if not isinstance(attention, nn.Module):
            raise TypeError(f"{caller}: layers.{index} of {type(model).__name__} has no self_attn, expected one")
        found[f"layers.{index}.self_attn"] = attention
    return found


def head_table(caller: str, full_attention_heads: HeadTable, layers: int, kv_heads: int) -> Tensor:
    """The table as bool ``[layers, KV heads]`` on the CPU.

    Raises:
        TypeError: it is no table.
        ValueError: it has not this shape, or holds something other than 0 and 1.
    """

    def as_list(values: Any) -> list[Any]:
        values = values.tolist() if hasattr(values, "tolist") else values  # a tensor or an array
        if not isinstance(values, Sequence):
            raise TypeError(
                f"{caller}: full_attention_heads has {values!r} in place of a list, expected a row of 0 and 1 a layer"
            )
        return list(values)

    rows = [as_list(row) for row in as_list(full_attention_heads)]
    if len(rows) != layers:
        raise ValueError(f"{caller}: full_attention_heads has {len(rows)} rows, expected {layers}, one a layer")
    for layer, row in enumerate(rows):
        if len(row) != kv_heads:
            raise ValueError(
                f"{caller}: full_attention_heads[{layer}] has {len(row)} heads, expected {kv_heads}, one a KV head"
            )
        for head, value in enumerate(row):
            if value not in (0, 1):
                raise ValueError(
                    f"{caller}: full_attention_heads[{layer}][{head}] is {value}, expected 0 or 1; "
                    "sparsify_attention_heads makes such a table"
                )
    return torch.tensor([[bool(value) for value in row] for row in rows], dtype=torch.bool)
