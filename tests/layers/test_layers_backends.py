"""Which backend a layer gets and which arguments that takes; backends of others."""

import asyncio
import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lite_attention.layers import (
    AttentionBackend,
    AttentionBackendEnum,
    AttentionImpl,
    AttentionMetadata,
    Backend,
    DistributedAttention,
    DistributedAttention_VSA,
    LocalAttention,
    backend_name_to_enum,
    backends,
    get_attn_backend,
    get_env_variable_attn_backend,
    get_global_forced_attn_backend,
    global_force_attn_backend,
    global_force_attn_backend_context_manager,
    register_attention_backend,
    registry,
    set_forward_context,
)
from lite_attention.layers.registry import BackendName
from lite_attention.layers.selector import STR_BACKEND_ENV_VAR
from lite_attention.ops import backends as kernels
from support.inputs import report
from support.layer_models import (
    HEAD_SIZE,
    HEADS,
    LinearBackend,
    LinearImpl,
    LinearMetadata,
    Metadata,
    dense,
    layer,
    qkv,
)

TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN = list(AttentionBackendEnum)[:4]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_lite_attention_takes_its_arguments_from_the_layer() -> None:
    attend = layer(
        DistributedAttention, LITE_ATTN, threshold=[-1.0, -2.0, -3.0, -4.0], max_batch_size=7, enable_skipping=False
    )
    state = attend.attn_impl.attention
    assert (state.threshold, state.max_batch_size, state.skipping) == ((-1.0, -2.0, -3.0, -4.0), 7, False)
    attend.attn_impl.set_local_heads(2, 2)
    assert state.threshold == (-3.0, -4.0)


def test_a_layer_may_name_the_arguments_of_every_backend() -> None:
    made = [
        layer(DistributedAttention, backend, threshold=-3.0, layer_index=5)
        for backend in (TORCH_SDPA, LITE_ATTN, SLIDING_TILE_ATTN)
    ]
    assert [one.backend for one in made] == [TORCH_SDPA, LITE_ATTN, SLIDING_TILE_ATTN]
    assert made[1].attn_impl.attention.threshold == -3.0
    assert made[2].attn_impl.layer_index == 5


def test_a_layer_number_that_is_assigned_is_the_one_whose_windows_are_used() -> None:
    first, second, moved = (
        layer(LocalAttention, SLIDING_TILE_ATTN, prefix=f"blocks.{number}.attn") for number in (0, 1, 0)
    )
    metadata = Metadata(SLIDING_TILE_ATTN)
    metadata.arguments |= {"text_tokens": 0, "text_length": None}
    inputs = qkv()
    with torch.no_grad(), set_forward_context(0, metadata.of_step(0)):
        out = moved(*inputs)
        assert torch.equal(out, first(*inputs))
        moved.attn_impl.layer_index = 1
        assert moved.attn_impl.layer_index == copy.deepcopy(moved).attn_impl.layer_index == 1
        assert torch.equal(moved(*inputs), second(*inputs))
        assert not torch.equal(moved(*inputs), out)
    with pytest.raises(ValueError, match="layer_index is -1, expected an int of at least 0"):
        moved.attn_impl.layer_index = -1


@pytest.mark.parametrize("name", ["num_heads", "head_size", "num_kv_heads", "softmax_scale", "backend"])
def test_what_a_backend_was_made_with_is_not_assigned_without_effect(name: str) -> None:
    attend = layer(LocalAttention, TORCH_SDPA)
    before = getattr(attend, name)
    for which in (attend, copy.deepcopy(attend)):
        with pytest.raises(AttributeError, match=f"LocalAttention: {name} is assigned 1, expected a new layer"):
            setattr(which, name, 1)
        assert getattr(which, name) == before


def test_every_file_of_a_backend_is_entered_under_its_name() -> None:
    files = {path.stem.upper() for path in Path(backends.__path__[0]).glob("[a-z]*.py")}
    assert [backend.name for backend in backends.BUILTIN] == list(registry._backends)
    assert {backend.name for backend in backends.BUILTIN} == files
    lacking = {name.name for name in registry._MISSING}
    assert set(AttentionBackendEnum.__members__) - files == lacking, "a reason is told for what is missing alone"


@pytest.mark.parametrize("backend", backends.BUILTIN, ids=lambda backend: backend.name)
def test_a_backend_has_the_class_that_code_for_fastvideo_asks(backend: Backend) -> None:
    face = get_attn_backend(HEAD_SIZE, torch.float32, (backend.name,))
    assert face is backend.face
    assert issubclass(face, AttentionBackend)
    asked = face.get_name(), face.get_impl_cls(), face.get_metadata_cls(), face.get_builder_cls()
    assert asked == (backend.name, backend.impl, backend.metadata, backend.builder)
    assert face.get_supported_head_sizes() == backend.head_sizes
    assert face.__name__ == backend.impl.__name__.removesuffix("Impl") + "Backend"
    assert pickle.loads(pickle.dumps(face)) is face, "a name of the file that has its impl"


def test_dtypes_are_those_of_the_kernels_where_the_layer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(device: str, dtype: torch.dtype, name: AttentionBackendEnum = LITE_ATTN) -> Callable[[], object]:
        def call() -> object:
            with torch.device(device):
                return get_attn_backend(HEAD_SIZE, dtype, (name,)).get_name()

        return call

    def refuse_fp32(problem: kernels.Problem) -> str | None:
        return "no" if problem.dtype == torch.float32 else None

    on_cpu = [backend for backend in kernels.backends() if backend.device_type == "cpu"]
    halves = kernels.Backend("halves", "cuda", refuse_fp32, functions=None)
    monkeypatch.setattr(kernels, "_table", [halves, *on_cpu])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert asked("cpu", dtype)() == asked("meta", dtype)() == "LITE_ATTN"
        assert asked("cuda:0", dtype, TORCH_SDPA)() == "TORCH_SDPA"
    assert asked("cuda:0", torch.bfloat16)() == "LITE_ATTN"
    found = report({"fp32 on a GPU": asked("cuda:0", torch.float32)})
    monkeypatch.setattr(kernels, "_table", on_cpu)
    found += "\n" + report({"a GPU without kernels": asked("cuda:0", torch.bfloat16)})
    assert_expected_inline(
        found,
        """\
fp32 on a GPU -> ValueError: get_attn_backend: dtype is torch.float32, expected torch.bfloat16 or torch.float16 for LITE_ATTN on cuda
a GPU without kernels -> ValueError: get_attn_backend: dtype is torch.bfloat16, expected none, as no backend runs there, for LITE_ATTN on cuda""",
    )


# Which backend a layer gets.


def test_what_is_forced_counts_before_the_environment_and_that_before_the_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen(supported: object = (SLIDING_TILE_ATTN, LITE_ATTN, TORCH_SDPA)) -> str:
        return get_attn_backend(HEAD_SIZE, torch.float32, supported).get_name()

    assert chosen() == "SLIDING_TILE_ATTN"
    assert chosen(None) == "TORCH_SDPA"
    monkeypatch.setenv(STR_BACKEND_ENV_VAR, "LITE_ATTN")
    assert get_env_variable_attn_backend() is LITE_ATTN
    assert chosen() == chosen(None) == "LITE_ATTN"
    with global_force_attn_backend_context_manager(TORCH_SDPA):
        assert chosen() == "TORCH_SDPA"
        with global_force_attn_backend_context_manager("SLIDING_TILE_ATTN"):
            assert get_global_forced_attn_backend() is SLIDING_TILE_ATTN
            assert chosen() == "SLIDING_TILE_ATTN"
        with global_force_attn_backend_context_manager(None):
            assert chosen() == "LITE_ATTN"
        assert chosen() == "TORCH_SDPA"
    global_force_attn_backend(TORCH_SDPA)
    try:
        assert chosen() == "TORCH_SDPA"
    finally:
        global_force_attn_backend(None)
    monkeypatch.setenv(STR_BACKEND_ENV_VAR, "")
    assert get_env_variable_attn_backend() is None
    assert chosen() == "SLIDING_TILE_ATTN"


def test_what_was_forced_comes_back_after_an_error() -> None:
    with pytest.raises(KeyError), global_force_attn_backend_context_manager(LITE_ATTN):
        raise KeyError
    assert get_global_forced_attn_backend() is None


def test_threads_and_tasks_force_backends_for_themselves() -> None:
    """And what is forced for the process holds for all that do not."""

    def chosen() -> str:
        return get_attn_backend(HEAD_SIZE, torch.float32).get_name()

    together, seen = threading.Barrier(2), {}

    def in_thread(name: str) -> None:
        before = chosen()
        with global_force_attn_backend_context_manager(name):
            together.wait(30)
            inside = chosen()
            together.wait(30)
        seen[name] = before, inside, chosen()

    async def task(name: str) -> str:
        with global_force_attn_backend_context_manager(name):
            await asyncio.sleep(0)
            return chosen()

    async def tasks() -> list[str]:
        return await asyncio.gather(*map(task, names))

    names = ["SLIDING_TILE_ATTN", "TORCH_SDPA"]
    global_force_attn_backend(LITE_ATTN)
    try:
        with global_force_attn_backend_context_manager("VIDEO_SPARSE_ATTN"):
            threads = [threading.Thread(target=in_thread, args=(name,)) for name in names]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert asyncio.run(tasks()) == names
            assert chosen() == "VIDEO_SPARSE_ATTN"
        assert chosen() == "LITE_ATTN"
    finally:
        global_force_attn_backend(None)
    assert seen == {name: ("LITE_ATTN", name, "LITE_ATTN") for name in names}


def test_a_layer_takes_the_first_backend_that_there_is() -> None:
    names = ("FLASH_ATTN", AttentionBackendEnum.SAGE_ATTN, "LITE_ATTN", "TORCH_SDPA")
    assert LocalAttention(HEADS, HEAD_SIZE, supported_attention_backends=names).backend is LITE_ATTN
    assert LocalAttention(HEADS, HEAD_SIZE).backend is TORCH_SDPA
    assert DistributedAttention(HEADS, HEAD_SIZE).backend is TORCH_SDPA
    assert DistributedAttention_VSA(HEADS, HEAD_SIZE).backend is VIDEO_SPARSE_ATTN


def test_a_layer_keeps_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(30)
    with global_force_attn_backend_context_manager(LITE_ATTN):
        attend = LocalAttention(HEADS, HEAD_SIZE)
    monkeypatch.setenv(STR_BACKEND_ENV_VAR, "nonsense")
    attend(q, k, v)
    assert attend.backend is LITE_ATTN
    assert float(attend.attn_impl.attention.skip_fraction()) == 0


@pytest.mark.slow
def test_the_environment_variable_is_read_when_a_layer_is_made() -> None:
    code = (
        "import os, lite_attention.layers as layers\n"
        f"os.environ['{STR_BACKEND_ENV_VAR}'] = 'LITE_ATTN'\n"
        "print(layers.LocalAttention(4, 32).backend.name)"
    )
    environment = os.environ | {STR_BACKEND_ENV_VAR: "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "LITE_ATTN\n"


def test_names_of_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [backend_name_to_enum(member.name) for member in AttentionBackendEnum] == list(AttentionBackendEnum)
    lacking = {
        name.name: lambda name=name: get_attn_backend(HEAD_SIZE, torch.float32, (name,))
        for name in AttentionBackendEnum
        if name not in (TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN)
    }

    def in_environment(name: str) -> None:
        monkeypatch.setenv(STR_BACKEND_ENV_VAR, name)
        try:
            LocalAttention(HEADS, HEAD_SIZE, supported_attention_backends=(TORCH_SDPA, LITE_ATTN))
        finally:
            monkeypatch.delenv(STR_BACKEND_ENV_VAR)

    def forced(name: Any, **arguments: Any) -> None:
        with global_force_attn_backend_context_manager(name):
            LocalAttention(HEADS, HEAD_SIZE, **arguments)

    calls = lacking | {
        "an unknown name in the environment": lambda: in_environment("LITE_ATTENTION"),
        "a name in small letters": lambda: in_environment("lite_attn"),
        "the environment asks for another backend": lambda: in_environment("SLIDING_TILE_ATTN"),
        "the environment asks for what is missing": lambda: in_environment("VMOBA_ATTN"),
        "an unknown name": lambda: backend_name_to_enum("MY_ATTN"),
        "no name": lambda: backend_name_to_enum(None),
        "an unknown name forced": lambda: forced("MY_ATTN"),
        "a number forced": lambda: forced(3),
        "another backend forced": lambda: forced(LITE_ATTN, supported_attention_backends=("TORCH_SDPA",)),
        "what is missing forced": lambda: forced("SLA_ATTN"),
        "an unknown name supported": lambda: layer(LocalAttention, "MY_ATTN"),
        "nothing supported": lambda: LocalAttention(HEADS, HEAD_SIZE, supported_attention_backends=()),
        "head size 36": lambda: LocalAttention(HEADS, 36, supported_attention_backends=(LITE_ATTN,)),
        "head size 264": lambda: DistributedAttention_VSA(HEADS, 264),
        "fp64": lambda: layer(DistributedAttention, SLIDING_TILE_ATTN, dtype=torch.float64),
    }
    assert_expected_inline(
        report(calls),
        """\
SLA_ATTN -> NotImplementedError: attention backend SLA_ATTN is not in this version: sparse-linear attention has no kernels here yet
SAGE_SLA_ATTN -> NotImplementedError: attention backend SAGE_SLA_ATTN is not in this version: sparse-linear attention has no kernels here yet, and quantized ones neither
VMOBA_ATTN -> NotImplementedError: attention backend VMOBA_ATTN is not in this version: attention to chosen chunks has no kernels here yet
FLASH_ATTN -> NotImplementedError: attention backend FLASH_ATTN is not in this version: dense attention is TORCH_SDPA, or LITE_ATTN with enable_skipping=False
SAGE_ATTN -> NotImplementedError: attention backend SAGE_ATTN is not in this version: quantized attention has no kernels here
an unknown name in the environment -> ValueError: environment variable LITE_ATTENTION_BACKEND is 'LITE_ATTENTION', expected one of TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN, SLA_ATTN, SAGE_SLA_ATTN, VMOBA_ATTN, FLASH_ATTN, SAGE_ATTN
a name in small letters -> ValueError: environment variable LITE_ATTENTION_BACKEND is 'lite_attn', expected one of TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN, SLA_ATTN, SAGE_SLA_ATTN, VMOBA_ATTN, FLASH_ATTN, SAGE_ATTN
the environment asks for another backend -> ValueError: get_attn_backend: environment variable LITE_ATTENTION_BACKEND asks for SLIDING_TILE_ATTN, expected one of those that the layer supports: TORCH_SDPA, LITE_ATTN
the environment asks for what is missing -> ValueError: get_attn_backend: environment variable LITE_ATTENTION_BACKEND asks for VMOBA_ATTN, expected one of those that the layer supports: TORCH_SDPA, LITE_ATTN
an unknown name -> ValueError: backend_name_to_enum: backend_name is 'MY_ATTN', expected one of TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN, SLA_ATTN, SAGE_SLA_ATTN, VMOBA_ATTN, FLASH_ATTN, SAGE_ATTN
no name -> TypeError: backend_name_to_enum: backend_name has type NoneType, expected an AttentionBackendEnum or str
an unknown name forced -> ValueError: global_force_attn_backend_context_manager: attn_backend is 'MY_ATTN', expected one of TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN, SLA_ATTN, SAGE_SLA_ATTN, VMOBA_ATTN, FLASH_ATTN, SAGE_ATTN
a number forced -> TypeError: global_force_attn_backend_context_manager: attn_backend has type int, expected an AttentionBackendEnum or str
another backend forced -> ValueError: get_attn_backend: global_force_attn_backend asks for LITE_ATTN, expected one of those that the layer supports: TORCH_SDPA
what is missing forced -> NotImplementedError: attention backend SLA_ATTN is not in this version: sparse-linear attention has no kernels here yet
an unknown name supported -> ValueError: get_attn_backend: supported_attention_backends[0] is 'MY_ATTN', expected one of TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN, SLA_ATTN, SAGE_SLA_ATTN, VMOBA_ATTN, FLASH_ATTN, SAGE_ATTN
nothing supported -> ValueError: get_attn_backend: supported_attention_backends is empty, expected a backend, or None for any
head size 36 -> ValueError: get_attn_backend: head_size is 36, expected a multiple of 8 from 8 to 256 for LITE_ATTN
head size 264 -> ValueError: get_attn_backend: head_size is 264, expected a multiple of 8 from 8 to 256 for VIDEO_SPARSE_ATTN
fp64 -> ValueError: get_attn_backend: dtype is torch.float64, expected torch.float32 or torch.bfloat16 or torch.float16 for SLIDING_TILE_ATTN on cpu""",
    )


# Backends of others.


class ChunkImpl(AttentionImpl[AttentionMetadata]):
    """A query attends to the keys of its chunk."""

    def __init__(
        self, num_heads: int, head_size: int, softmax_scale: float, causal: bool = False, num_kv_heads: int | None = None,
        prefix: str = "", chunk: int = 8,
    ) -> None:  # fmt: skip
        self.softmax_scale, self.chunk = softmax_scale, chunk

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None) -> Tensor:
        q, k, v = (x.unflatten(1, (-1, self.chunk)).transpose(2, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale)
        return out.transpose(2, 3).flatten(1, 2)


CHUNK_ATTN = Backend("CHUNK_TEST_ATTN", ChunkImpl)


def test_one_line_adds_a_backend_with_an_argument_of_its_own_to_layers_that_may_get_another() -> None:
    def made(name: BackendName) -> Any:
        options = ("CHUNK_TEST_ATTN", LITE_ATTN, TORCH_SDPA)
        with global_force_attn_backend_context_manager(name):
            return LocalAttention(HEADS, HEAD_SIZE, supported_attention_backends=options, chunk=15, threshold=-3.0)

    with pytest.raises(TypeError, match="got the argument 'chunk'"):
        layer(LocalAttention, LITE_ATTN, chunk=15, threshold=-3.0)

    register_attention_backend(CHUNK_ATTN)

    attend = made("CHUNK_TEST_ATTN")
    assert (attend.backend, attend.attn_impl.chunk) == ("CHUNK_TEST_ATTN", 15)
    q, k, v = qkv(60)
    expected = torch.cat([dense(*parts) for parts in zip(*(x.split(15, 1) for x in (q, k, v)), strict=True)], 1)
    torch.testing.assert_close(attend(q, k, v).double(), expected, atol=1e-5, rtol=0)
    skipping = made(LITE_ATTN)
    assert skipping.attn_impl.attention.threshold == -3.0
    for other in (skipping, made(TORCH_SDPA)):
        torch.testing.assert_close(other(q, k, v).double(), dense(q, k, v), atol=1e-5, rtol=0)
    assert_expected_inline(
        report({"an argument of none": lambda: layer(LocalAttention, TORCH_SDPA, chunk=15, chunks=4)}),
        """an argument of none -> TypeError: LocalAttention: got the argument 'chunks', expected one that a backend takes: enable_skipping, max_batch_size, policy, threshold (LITE_ATTN); layer_index (SLIDING_TILE_ATTN); chunk (CHUNK_TEST_ATTN)""",
    )


class HandsOnImpl(ChunkImpl):
    """With an argument more."""

    def __init__(self, *arguments: Any, shift: int = 0, **named: Any) -> None:
        super().__init__(*arguments, **named)


class NarrowImpl(ChunkImpl):
    """That settles the chunk."""

    def __init__(self, num_heads: int, head_size: int, softmax_scale: float, *, shift: int = 0) -> None:
        super().__init__(num_heads, head_size, softmax_scale, chunk=15)


class SilentImpl(ChunkImpl):
    """That reads what it is not seen to take."""

    arguments = frozenset({"window"})

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments)


def test_an_impl_takes_what_its_constructor_names_or_what_it_says() -> None:
    assert ChunkImpl.arguments == {"chunk"}
    assert HandsOnImpl.arguments == {"chunk", "shift"}
    assert NarrowImpl.arguments == {"shift"}
    assert SilentImpl.arguments == {"window"}
    assert LinearImpl.arguments == {"gain"}, "a class as FastVideo's code has it"
    assert {backend.name: set(backend.impl.arguments) for backend in backends.BUILTIN} == {
        "TORCH_SDPA": set(),
        "LITE_ATTN": {"enable_skipping", "max_batch_size", "policy", "threshold"},
        "VIDEO_SPARSE_ATTN": set(),
        "SLIDING_TILE_ATTN": {"layer_index"},
    }


@pytest.fixture
def linear() -> str:
    register_attention_backend("LINEAR_TEST_ATTN", LinearBackend)
    return "LINEAR_TEST_ATTN"


def test_a_registered_backend_serves_like_one_of_this_package(linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_name_to_enum(linear) is None
    monkeypatch.setenv(STR_BACKEND_ENV_VAR, linear)
    attend = DistributedAttention(HEADS, HEAD_SIZE, 2, 0.3, supported_attention_backends=(TORCH_SDPA, linear), gain=2.0)
    assert attend.backend == linear
    assert attend.attn_impl.given == (HEADS, HEAD_SIZE, 0.3, False, 2, "", 2.0)
    assert list(attend.state_dict()) == ["attn_impl.weight"]

    attend = DistributedAttention(HEADS, HEAD_SIZE, prefix="blocks.1.attn")
    assert attend.attn_impl.given[-2] == "blocks.1.attn.impl"
    (q, k, v), (text_q, text_k, text_v) = qkv(30), qkv(5, seed=1)
    with set_forward_context(0, LinearBackend.get_builder_cls()().build(current_timestep=0, strength=0.5)):
        out, text_out = attend(q, k, v, None, text_q, text_k, text_v)
    all_q, all_k, all_v = (torch.cat(pair, 1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
    expected = 0.5 * torch.einsum("bqhd,bkhd,bkhe->bqhe", all_q, all_k, all_v) + v[:, -1:]
    torch.testing.assert_close(torch.cat([out, text_out], 1), expected)


def test_what_a_backend_returns_has_the_shape_of_its_query(linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(60)
    made = DistributedAttention(HEADS, HEAD_SIZE, supported_attention_backends=(linear,))
    monkeypatch.setattr(made.attn_impl, "forward", lambda query, *_: query[:, :5])
    with pytest.raises(
        ValueError, match=rf"the backend {linear} returned the shape \[.*, 5, .*\], expected \[.*, 60, .*\]"
    ):
        made(q, k, v)


@pytest.mark.parametrize("layer_class", [DistributedAttention, LocalAttention])
def test_a_backend_gives_back_the_tokens_that_it_was_given(
    linear: str, layer_class: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer_class(HEADS, HEAD_SIZE, supported_attention_backends=(linear,))
    monkeypatch.setattr(made.attn_impl, "preprocess_qkv", lambda x, _: x[:, 5:])
    monkeypatch.setattr(made.attn_impl, "postprocess_output", lambda x, _: x)
    monkeypatch.setattr(made.attn_impl, "forward", lambda query, *_: query)
    said = rf"postprocess_output of the backend {linear} returned the shape \[.*, 55, .*\], expected \[.*, 60, .*\]"
    with pytest.raises(ValueError, match=said):
        made(*qkv(60))


def test_a_layer_on_one_rank_prepares_tokens_for_the_backend_too(linear: str) -> None:
    attend = layer(LocalAttention, linear)
    q, k, v = qkv(30)
    with set_forward_context(0, LinearMetadata(0, torch.tensor(0.0))):
        torch.testing.assert_close(attend(q, k, v), v[:, -1:].expand_as(q))


def test_registering_refuses_what_would_fail_later(linear: str) -> None:
    class Incomplete(AttentionBackend):
        @staticmethod
        def get_name() -> str:
            return "INCOMPLETE"

    class OtherImpl(LinearBackend):
        @staticmethod
        def get_name() -> str:
            return "OTHER"

        @staticmethod
        def get_impl_cls() -> Any:
            return AttentionImpl

    class WordImpl(LinearImpl):
        arguments = "gain"

    class OtherMetadata(LinearBackend):
        @staticmethod
        def get_name() -> str:
            return "OTHER"

        @staticmethod
        def get_metadata_cls() -> Any:
            return dict

    calls = {
        "a name of this package": lambda: register_attention_backend("LITE_ATTN", LinearBackend),
        "a name that is reserved": lambda: register_attention_backend("SLA_ATTN", LinearBackend),
        "a name twice": lambda: register_attention_backend(linear, LinearBackend),
        "a name that the class does not say": lambda: register_attention_backend("MINE", LinearBackend),
        "a number for a name": lambda: register_attention_backend(3, LinearBackend),
        "a string for a class": lambda: register_attention_backend("MINE", "LinearBackend"),
        "no backend": lambda: register_attention_backend("MINE", LinearImpl),
        "methods are lacking": lambda: register_attention_backend("INCOMPLETE", Incomplete),
        "methods of the impl are lacking": lambda: register_attention_backend("OTHER", OtherImpl),
        "metadata of another kind": lambda: register_attention_backend("OTHER", OtherMetadata),
        "a Backend and a class": lambda: register_attention_backend(CHUNK_ATTN, LinearBackend),
        "a Backend of a name that is taken": lambda: register_attention_backend(Backend("LITE_ATTN", LinearImpl)),
        "a Backend of a number": lambda: register_attention_backend(Backend(3, LinearImpl)),
        "a Backend of another impl": lambda: register_attention_backend(Backend("MINE", dict)),
        "a Backend of another builder": lambda: register_attention_backend(Backend("MINE", LinearImpl, builder=3)),
        "a word for its arguments": lambda: register_attention_backend(Backend("MINE", WordImpl)),
        "a head size that it does not take": lambda: LocalAttention(4, 64, supported_attention_backends=(linear,)),
        "an unknown name names it": lambda: backend_name_to_enum("LINEAR"),
    }
    assert_expected_inline(
        report(calls),
        """\
a name of this package -> ValueError: register_attention_backend: name is 'LITE_ATTN', which is taken, expected another name
a name that is reserved -> ValueError: register_attention_backend: name is 'SLA_ATTN', which is taken, expected another name
a name twice -> ValueError: register_attention_backend: name is 'LINEAR_TEST_ATTN', which is taken, expected another name
a name that the class does not say -> ValueError: register_attention_backend: name is 'MINE', expected 'LINEAR_TEST_ATTN', which get_name() says
a number for a name -> TypeError: register_attention_backend: name has type int, expected a Backend or str
a string for a class -> TypeError: register_attention_backend: backend_class is 'LinearBackend', expected a class that derives from AttentionBackend
no backend -> TypeError: register_attention_backend: backend_class is <class 'support.layer_models.LinearImpl'>, expected a class that derives from AttentionBackend
methods are lacking -> TypeError: register_attention_backend: backend_class is Incomplete, which lacks get_builder_cls, get_impl_cls, get_metadata_cls
methods of the impl are lacking -> TypeError: register_attention_backend: OtherImpl.get_impl_cls() is AttentionImpl, which lacks __init__, forward
metadata of another kind -> TypeError: register_attention_backend: OtherMetadata.get_metadata_cls() is <class 'dict'>, expected a class that derives from AttentionMetadata
a Backend and a class -> TypeError: register_attention_backend: backend_class is <class 'support.layer_models.LinearBackend'>, expected none beside a Backend
a Backend of a name that is taken -> ValueError: register_attention_backend: name is 'LITE_ATTN', which is taken, expected another name
a Backend of a number -> TypeError: register_attention_backend: name has type int, expected a Backend or str
a Backend of another impl -> TypeError: register_attention_backend: impl of the Backend is <class 'dict'>, expected a class that derives from AttentionImpl
a Backend of another builder -> TypeError: register_attention_backend: builder of the Backend is 3, expected a class that derives from AttentionMetadataBuilder
a word for its arguments -> TypeError: register_attention_backend: WordImpl.arguments is 'gain', expected a frozenset of str
a head size that it does not take -> ValueError: get_attn_backend: head_size is 64, expected 32 for LINEAR_TEST_ATTN
an unknown name names it -> ValueError: backend_name_to_enum: backend_name is 'LINEAR', expected one of TORCH_SDPA, LITE_ATTN, VIDEO_SPARSE_ATTN, SLIDING_TILE_ATTN, SLA_ATTN, SAGE_SLA_ATTN, VMOBA_ATTN, FLASH_ATTN, SAGE_ATTN, LINEAR_TEST_ATTN""",
    )
