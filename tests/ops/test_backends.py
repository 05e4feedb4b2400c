"""The table of backends: who is asked, who is chosen, and what a call without a backend is told."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lite_attention import attention, merge_attention, reference, top_k_map
from lite_attention.ops import backends, load
from lite_attention.ops.backends import Backend, Problem, registered
from support.inputs import report

ATTENTION = Problem("attention", torch.device("cpu"), torch.float32, 64)
ON_CUDA = Problem("attention", torch.device("cuda", 0), torch.bfloat16, 128)
H200, L4, A100 = ("NVIDIA H200", 9, 0), ("NVIDIA L4", 8, 9), ("NVIDIA A100-SXM4-80GB", 8, 0)

FakeGpus = Callable[..., None]


@pytest.fixture
def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpus]:
    """Let the table believe in these CUDA devices and in kernels for them."""

    def install(*gpus: tuple[str, int, int], why_no_kernels: str = "") -> None:
        devices = [SimpleNamespace(name=name, major=major, minor=minor) for name, major, minor in gpus]
        monkeypatch.setattr(backends, "WHY_NO_CUDA_KERNELS", why_no_kernels)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: devices[device.index])
        backends._gpu.cache_clear()

    yield install
    monkeypatch.undo()
    backends._gpu.cache_clear()


def half_precision_only(calls: list[str]) -> Backend:
    """Runs attention in fp16 on the CPU by the oracle, and notes that it did."""

    def can_run(problem: Problem) -> str | None:
        return None if problem.dtype == torch.float16 else f"dtype is {problem.dtype}, expected float16"

    def run(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        calls.append("attention")
        out, lse = reference.attention(q, k, v, *arguments, **named)
        return out.to(q.dtype), lse.float()

    return Backend("halves", "cpu", can_run, {"attention": run})


def qkv(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1, 100, 2, 64).to(dtype) for _ in range(3)]


def test_a_registered_backend_is_chosen_where_it_can_run_and_the_next_one_elsewhere() -> None:
    calls: list[str] = []
    before = attention(*qkv(torch.float32))
    with registered(half_precision_only(calls), before="cpu"):
        halves = qkv(torch.float16)
        out, lse = attention(*halves)
        assert calls == ["attention"]
        torch.testing.assert_close(out, attention(*halves, causal=None)[0])
        assert len(calls) == 2
        torch.manual_seed(0)
        after = attention(*qkv(torch.float32))  # the compiled kernel, by way of the table
        assert len(calls) == 2
        merged, _ = merge_attention([out], [lse])  # an operator that the backend does not have
        torch.testing.assert_close(merged, out)
        assert top_k_map(torch.rand(3, 40), 4).shape == (3, 2)
        assert backends.choose(Problem("attention", torch.device("cpu"), torch.float16, 64)).name == "halves"
        assert backends.choose(ATTENTION).name == "cpu"
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    attention(*halves)
    assert len(calls) == 2, "nothing is asked once it is taken out"


def test_one_that_is_asked_last_is_not_chosen_where_the_kernels_run() -> None:
    calls: list[str] = []
    with registered(half_precision_only(calls)):
        attention(*qkv(torch.float16))
        assert [backend.name for backend in backends.backends()] == ["sm90", "cpu", "halves"]
    assert calls == []


def test_compiled_code_finds_a_registered_backend() -> None:
    calls: list[str] = []
    compiled = torch.compile(lambda *tensors: attention(*tensors)[0], backend="aot_eager", fullgraph=True)
    halves = qkv(torch.float16)
    expected = compiled(*halves)
    with registered(half_precision_only(calls), before="cpu"):
        torch.testing.assert_close(compiled(*halves), expected)
    assert calls == ["attention"]


def test_calls_reach_the_compiled_kernel_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(problem: Problem) -> Backend:
        raise AssertionError(f"asked for {problem}")

    monkeypatch.setattr(backends, "choose", refuse)
    attention(*qkv(torch.float32))
    assert "cpu" not in backends._routes


def test_a_call_without_a_backend_is_told_each_with_its_reason(fake_gpus: FakeGpus) -> None:
    fake_gpus(A100)
    backends.register(
        Backend("tiles", "cuda", lambda problem: f"head_dim is {problem.head_dim}, expected 64", {"attention": max})
    )
    try:
        with pytest.raises(NotImplementedError) as caught:
            backends.choose(ON_CUDA)
        assert backends.reasons(ON_CUDA)["cpu"] == "runs on cpu tensors"
    finally:
        backends.unregister("tiles")
    assert_expected_inline(
        str(caught.value),
        """\
attention: no backend runs bfloat16, head_dim 128, on cuda:0
  sm90: NVIDIA A100-SXM4-80GB is of compute capability 8.0, expected 9.0
  cpu: runs on cpu tensors
  tiles: head_dim is 128, expected 64
`python -m lite_attention.info` tells what can run here""",
    )


def test_a_build_without_nvcc_names_that_and_the_cure(fake_gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    build = SimpleNamespace(
        CUDA_ARCHITECTURES="",
        WHY_NO_CUDA="no nvcc was found when it was built: get nvcc 12.8 or newer (with the CUDA toolkit, or "
        "`pip install 'cuda-toolkit[nvcc,cccl]'`) and install it again (`pip install .`)",
    )
    fake_gpus(H200, why_no_kernels=load._load_cuda_operators(build))
    with pytest.raises(NotImplementedError) as caught:
        backends.choose(ON_CUDA)
    assert_expected_inline(
        str(caught.value),
        """\
attention: no backend runs bfloat16, head_dim 128, on cuda:0
  sm90: this build holds no CUDA kernels, as no nvcc was found when it was built: get nvcc 12.8 or newer (with the CUDA toolkit, or `pip install 'cuda-toolkit[nvcc,cccl]'`) and install it again (`pip install .`)
  cpu: runs on cpu tensors
`python -m lite_attention.info` tells what can run here""",
    )


def test_a_call_on_the_cuda_key_asks_the_table_where_a_gpu_is_no_hopper(fake_gpus: FakeGpus) -> None:
    fake_gpus(H200)
    assert backends._is_direct("cuda")
    fake_gpus(H200, L4)
    assert not backends._is_direct("cuda")


@pytest.mark.parametrize(
    ("why_not", "gpus", "expected"),
    [
        ("this build holds no CUDA kernels", [H200], (False, "this build holds no CUDA kernels")),
        ("", [], (False, "torch sees no CUDA device")),
        ("", [L4], (False, "NVIDIA L4 is of compute capability 8.9, expected 9.0")),
        (
            "",
            [L4, A100],
            (
                False,
                "NVIDIA L4 is of compute capability 8.9, expected 9.0; NVIDIA A100-SXM4-80GB is of compute capability 8.0, expected 9.0",
            ),
        ),
        ("", [L4, H200], (True, "NVIDIA H200")),
    ],
    ids=["no kernels", "no device", "no Hopper", "two others", "a Hopper among others"],
)
def test_the_hopper_kernels_are_available_where_a_hopper_is(
    fake_gpus: FakeGpus, why_not: str, gpus: list[tuple[str, int, int]], expected: tuple[bool, str]
) -> None:
    fake_gpus(*gpus, why_no_kernels=why_not)
    assert backends.availability(backends.backends()[0]) == expected


def test_dtypes_are_those_that_some_backend_takes(fake_gpus: FakeGpus) -> None:
    fake_gpus(H200)
    assert backends.supported_dtypes(torch.device("cuda", 0)) == (torch.bfloat16, torch.float16)
    assert backends.supported_dtypes(torch.device("cpu")) == (torch.float32, torch.bfloat16, torch.float16)
    assert backends.supported_dtypes(torch.device("mps")) == ()


def test_what_cannot_be_registered_is_named() -> None:
    def backend(name: str = "new", device_type: str = "cpu", **functions: Callable[..., Any]) -> Backend:
        return Backend(name, device_type, lambda _: None, functions)

    calls = {
        "a name twice": lambda: backends.register(backend("cpu", attention=max)),
        "before nobody": lambda: backends.register(backend(attention=max), before="triton"),
        "another device": lambda: backends.register(backend(device_type="tpu", attention=max)),
        "no functions": lambda: backends.register(backend()),
        "an unknown operator": lambda: backends.register(backend(atention=max)),
        "taken out unregistered": lambda: backends.unregister("new"),
        "a compiled one taken out": lambda: backends.unregister("cpu"),
    }
    assert_expected_inline(
        report(calls),
        """\
a name twice -> ValueError: register: backend has the name 'cpu', which is taken, expected another
before nobody -> ValueError: register: before is 'triton', expected one of sm90, cpu
another device -> ValueError: register: backend has device_type 'tpu', expected one of cpu, cuda, xpu, mps
no functions -> ValueError: register: backend has functions for nothing, expected some of attention, merge_attention, skip_attention, top_k_map
an unknown operator -> ValueError: register: backend has functions for atention, expected some of attention, merge_attention, skip_attention, top_k_map
taken out unregistered -> ValueError: unregister: name is 'new', expected a registered backend's (there is none)
a compiled one taken out -> ValueError: unregister: name is 'cpu', expected a registered backend's (there is none)""",
    )
    assert [entry.name for entry in backends.backends()] == ["sm90", "cpu"]


def test_a_backend_that_is_asked_last_runs_what_the_kernels_refuse() -> None:
    calls: list[str] = []

    def run(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        calls.append(f"{q.dtype}, head_dim {q.shape[-1]}")
        return q.clone(), q.new_zeros(q.shape[0], q.shape[2], q.shape[1]).float()

    with registered(Backend("rest", "cpu", lambda _: None, {"attention": run})):
        attention(*qkv(torch.float32))
        attention(*qkv(torch.float64))
        attention(*(torch.randn(1, 20, 2, 512) for _ in range(3)))
        assert backends.reasons(Problem("attention", torch.device("cpu"), torch.float64, 12))["cpu"] == (
            "dtype is float64, expected float32, bfloat16 or float16"
        )
        assert backends.reasons(Problem("attention", torch.device("cpu"), torch.float32, 12))["cpu"] == (
            "head_dim is 12, expected a multiple of 8 up to 256"
        )
    assert calls == ["torch.float64, head_dim 64", "torch.float32, head_dim 512"]


def test_kernels_that_torch_wrote_run_in_their_own_precision_under_autocast() -> None:
    dtypes: list[torch.dtype] = []

    def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        dtypes.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return outs[0].clone(), lses[0].clone()

    out, lse = attention(*qkv(torch.float32))
    backend = Backend("torch", "cpu", lambda _: None, {"merge_attention": merge})
    with registered(backend, before="cpu"), torch.autocast("cpu", torch.bfloat16):
        merge_attention([out], [lse])
    assert dtypes == [torch.float32]


def test_a_backend_without_a_gpu_or_without_attention_is_told_as_it_is(fake_gpus: FakeGpus) -> None:
    fake_gpus()
    merging = Backend("merging", "cuda", lambda _: None, {"merge_attention": max})
    assert backends.availability(merging) == (False, "torch sees no CUDA device")
    fake_gpus(L4)
    assert backends.availability(merging) == (True, "NVIDIA L4")
    assert backends.supported_dtypes(torch.device("cuda", 0)) == ()


def test_the_kernels_words_for_odd_arguments_come_through_the_table() -> None:
    with (
        registered(half_precision_only([]), before="cpu"),
        pytest.raises(RuntimeError, match="merge_attention: outs is empty"),
    ):
        torch.ops.lite_attention.merge_attention([], [torch.zeros(1, 2, 3)])
