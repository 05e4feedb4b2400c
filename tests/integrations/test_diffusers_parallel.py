"""The diffusers door where the ranks of a mesh share a video: Ulysses, ring and both, with diffusers' own hooks."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lite_attention import LiteAttention
from lite_attention.integrations.diffusers import LiteAttentionHandle, enable_lite_attention
from support.inputs import report
from support.ranks import mesh_of, run_on_ranks
from support.video_models import CASES, HEAD_DIM, HEADS, TOKENS, VideoCase, make_latents, make_transformer, run
from support.video_pipelines import generate, wan

pytestmark = pytest.mark.slow

WAN = CASES["wan"]
TIMESTEPS = (900.0, 700.0, 500.0)
THRESHOLD = -2.0
BRANCHES = ("cond", "uncond")

each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
split_models = pytest.mark.parametrize("name", ["wan", "ltx"])


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Diffusers numbers the accelerators of a host, of which a machine without one has none to divide by."""
    count = torch.accelerator.device_count() or 1
    with torch.no_grad(), mock.patch.object(torch.accelerator, "device_count", return_value=count):
        yield


def place(x: Any, device: str) -> Any:
    """On the device, in a dtype that its kernels take."""
    return x if device == "cpu" else x.to("cuda", torch.bfloat16)


def call(transformer: nn.Module, case: VideoCase, device: str, step: int, timestep: float, seed: int = 0) -> Tensor:
    """One call. Where the model masks text, some of it is padding."""
    inputs = case.inputs(place(make_latents(case, step, seed=seed), device), timestep)
    if "encoder_attention_mask" in inputs:
        inputs["encoder_attention_mask"][:, 25:] = 0
    out: Tensor = transformer(**inputs)[0]
    return out


def denoise(
    transformer: nn.Module, case: VideoCase, device: str, seed: int = 0, steps: int = len(TIMESTEPS)
) -> list[Tensor]:
    """The outputs of one generation, its branches one after the other in each step."""
    outs = []
    for step, timestep in enumerate(TIMESTEPS[:steps]):
        for branch, name in enumerate(BRANCHES):
            with transformer.cache_context(name):  # type: ignore[operator]
                outs.append(call(transformer, case, device, step, timestep, seed + 10 * branch))
    return outs


def assert_close(outs: list[Tensor], expected: list[Tensor], device: str) -> None:
    """Equal up to rounding, in other places than in one process: matrix products of fewer rows."""
    for out, right in zip(outs, expected, strict=True):
        error = float((out - right).float().norm() / right.float().norm())
        assert error < (1e-5 if device == "cpu" else 0.05)


def on_mesh(case: VideoCase, mesh: DeviceMesh, **settings: Any) -> tuple[nn.Module, LiteAttentionHandle]:
    transformer = place(make_transformer(case), mesh.device_type)
    return transformer, enable_lite_attention(transformer, mesh=mesh, **settings)


def local_heads(handle: LiteAttentionHandle) -> list[int]:
    layer: Any = next(iter(handle.layers.values()))
    return list(layer.local_heads(HEADS))


# Ulysses


@each_device
@split_models
def test_ulysses_skips_what_one_process_skips(device: str, name: str) -> None:
    case = CASES[name]
    tables = run_on_ranks(2, device, _ulysses_skips_what_one_process_skips, device, name)
    fractions = torch.stack([of_rank for of_rank, _ in tables]).mean(0)
    assert fractions.shape == (len(case.layers), len(TIMESTEPS))
    torch.testing.assert_close(fractions, tables[0][1], atol=1e-5 if device == "cpu" else 0.05, rtol=0)
    assert (fractions[:, 0] == 0).all(), "the first step is complete"
    assert (fractions[:, 1:] > 0.05).all()


def _ulysses_skips_what_one_process_skips(device: str, name: str) -> tuple[Tensor, Tensor]:
    case = CASES[name]
    with inference():
        single = place(make_transformer(case), device)
        single_handle = enable_lite_attention(single, threshold=THRESHOLD)
        transformer, handle = on_mesh(case, mesh_of(device, 1, 2), threshold=THRESHOLD)
        for seed in range(2):  # the second generation is noticed by its timesteps
            outs, expected = (denoise(model, case, device, seed) for model in (transformer, single))
            assert_close(outs, expected, device)
            for branch in range(len(BRANCHES)):
                for layer, alone in zip(handle.layers.values(), single_handle.layers.values(), strict=True):
                    of_rank, of_one = layer.keep_map(branch=branch), alone.keep_map(branch=branch)
                    differing = of_rank != of_one[:, local_heads(handle)]
                    assert differing.float().mean() < (0.01 if device == "cpu" else 0.05), "but for rounding"
        assert local_heads(handle) == [mesh_of(device, 1, 2).get_local_rank("ulysses")]
        return handle.skip_fraction("cond"), single_handle.skip_fraction("cond")


def test_a_pipeline_of_two_transformers_makes_the_video_of_one_process() -> None:
    run_on_ranks(2, "cpu", _a_pipeline_of_two_transformers)


def _a_pipeline_of_two_transformers() -> None:
    with inference():
        videos, fractions = [], []
        for mesh in (None, mesh_of("cpu", 1, 2)):
            pipeline = wan(transformers=2)
            handle = enable_lite_attention(pipeline, threshold=THRESHOLD, dense_steps=1, mesh=mesh)
            videos.append(generate(pipeline, steps=3))
            fractions.append(handle.skip_fraction("uncond"))
        assert_close(videos[1:], videos[:1], "cpu")
        assert all((table > 0.02).any() for table in fractions)


# Rings


@each_device
@split_models
@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (2, 2)], ids=["ring-2", "usp-2x2"])
def test_a_ring_is_dense_attention_where_nothing_is_dropped(device: str, name: str, ring: int, ulysses: int) -> None:
    run_on_ranks(ring * ulysses, device, _dense, device, name, ring, ulysses)


def _dense(device: str, name: str, ring: int, ulysses: int) -> None:
    case = CASES[name]
    with inference():
        expected = denoise(place(make_transformer(case), device), case, device, steps=2)
        transformer, handle = on_mesh(case, mesh_of(device, ring, ulysses), threshold=-math.inf)
        assert_close(denoise(transformer, case, device, steps=2), expected, device)
        assert (handle.skip_fraction("cond") == 0).all()


@each_device
@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (2, 2)], ids=["ring-2", "usp-2x2"])
def test_a_ring_skips_and_starts_each_generation_anew(device: str, ring: int, ulysses: int) -> None:
    fractions = torch.stack(run_on_ranks(ring * ulysses, device, _ring_skips, device, ring, ulysses)).mean(0)
    assert (fractions[:, 0] == 0).all()
    assert (fractions[:, 1:] > 0.05).all()


def _ring_skips(device: str, ring: int, ulysses: int) -> Tensor:
    with inference():
        dense = denoise(place(make_transformer(WAN), device), WAN, device)
        transformer, handle = on_mesh(WAN, mesh_of(device, ring, ulysses), threshold=THRESHOLD)
        first = denoise(transformer, WAN, device)
        for out, right in zip(first, dense, strict=True):
            assert float((out - right).float().norm() / right.float().norm()) < 0.05
        denoise(transformer, WAN, device, seed=1, steps=2)
        assert all(map(torch.equal, denoise(transformer, WAN, device), first))
        return handle.skip_fraction("uncond")


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 1)], ids=["ulysses", "ring"])
def test_must_do_ranges_count_tokens_of_the_whole_video(ring: int, ulysses: int) -> None:
    run_on_ranks(2, "cpu", _must_do, ring, ulysses)


def _must_do(ring: int, ulysses: int) -> None:
    with inference():
        transformer, handle = on_mesh(WAN, mesh_of("cpu", ring, ulysses), threshold=0.0, must_do=[480, 500])
        # A ring of two holds tokens 0 to 489 and 490 to 979, each with tiles of its own.
        kept = [(0, 480 // 128), (1, (499 - TOKENS // 2) // 128)] if ring == 2 else [(0, 480 // 128)]
        dropped = [(1, (740 - TOKENS // 2) // 128)] if ring == 2 else [(0, 740 // 128)]
        for wanted, unwanted in ((kept, dropped), (dropped, kept)):
            denoise(transformer, WAN, "cpu", steps=2)
            for layer in handle.layers.values():
                maps: list[Tensor] = [layer.keep_map(split) for split in range(ring)]  # type: ignore[arg-type]
                assert all(maps[split][..., tile].all() for split, tile in wanted)
                assert not all(maps[split][..., tile].all() for split, tile in unwanted)
            handle.set_must_do([740, 741])
            handle.reset()


# The handle


def test_context_parallelism_that_is_enabled_is_joined_and_left_as_it_is() -> None:
    run_on_ranks(2, "cpu", _joined)


def enable_parallelism(transformer: Any, mesh: DeviceMesh | None, **options: Any) -> None:
    ring, ulysses, *_ = (1, 2) if mesh is None else mesh.shape
    transformer.enable_parallelism(
        config=ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, mesh=mesh, **options)
    )


def _joined() -> None:
    case, mesh = CASES["wan-from-image"], mesh_of("cpu", 1, 2)
    larger = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("ring", "ulysses", "fsdp"))
    with inference():
        transformer, _ = on_mesh(case, larger["ring", "ulysses"], threshold=THRESHOLD)
        expected = denoise(transformer, case, "cpu", steps=2)
        dense = denoise(make_transformer(case), case, "cpu", steps=1)
        for made_by_diffusers in (False, True):
            joined = make_transformer(case)
            enable_parallelism(joined, None if made_by_diffusers else larger)
            before = joined.attn_processors
            handle = enable_lite_attention(joined, threshold=THRESHOLD, mesh=mesh if made_by_diffusers else None)
            assert all(map(torch.equal, denoise(joined, case, "cpu", steps=2), expected))
            handle.disable()
            assert joined.attn_processors == before
            assert all(processor._parallel_config is not None for processor in before.values())  # type: ignore[union-attr]
            assert_close(denoise(joined, case, "cpu", steps=1), dense, "cpu")
            enable_lite_attention(joined, threshold=THRESHOLD)


def test_context_parallelism_that_the_door_enabled_goes_with_it() -> None:
    run_on_ranks(2, "cpu", _goes_with_it)


def _goes_with_it() -> None:
    with inference():
        for name, mesh in (("wan", mesh_of("cpu", 1, 2)), ("ltx", mesh_of("cpu", 2, 1))):
            case = CASES[name]
            transformer = make_transformer(case)
            before = transformer.attn_processors
            dense = denoise(transformer, case, "cpu", steps=1)
            for _ in range(2):
                handle = enable_lite_attention(transformer, threshold=THRESHOLD, layers=[0], mesh=mesh)
                if name == "wan":  # in a ring diffusers' own layers want another backend than the one on the CPU
                    denoise(transformer, case, "cpu", steps=1)
                handle.disable()
                assert transformer._parallel_config is None
                assert transformer.attn_processors == before
                assert all(processor._parallel_config is None for processor in before.values())  # type: ignore[union-attr]
                assert all(map(torch.equal, denoise(transformer, case, "cpu", steps=1), dense))


def test_settings_act_on_every_rank() -> None:
    run_on_ranks(2, "cpu", _settings)


def _settings() -> None:
    with inference():
        transformer, handle = on_mesh(WAN, mesh_of("cpu", 1, 2), threshold=[0.0, -math.inf], dense_steps=2)
        denoise(transformer, WAN, "cpu")
        fractions = handle.skip_fraction("cond")
        assert (fractions[:, :2] == 0).all()
        assert ((fractions[:, 2:] > 0.05) == (local_heads(handle) == [0])).all(), "a threshold for each head"
        handle.set_threshold(-math.inf)
        denoise(transformer, WAN, "cpu")
        assert (handle.skip_fraction("cond") == 0).all()
        for layer in handle.layers.values():
            layer.enable_skip_optimization(False)
        dense = denoise(make_transformer(WAN), WAN, "cpu", steps=1)
        assert_close(denoise(transformer, WAN, "cpu", steps=1), dense, "cpu")


# What is refused


def test_errors() -> None:
    text, _ = run_on_ranks(2, "cpu", _errors)
    assert_expected_inline(
        text,
        """\
not a mesh -> TypeError: enable_lite_attention: mesh has type int, expected a DeviceMesh
a mesh without names -> ValueError: enable_lite_attention: mesh has dimensions named nothing, expected 'ring', 'ulysses' or both. Of a larger mesh, pass mesh['ring', 'ulysses']
a mesh of one dimension -> ValueError: enable_lite_attention: mesh has the dimension ulysses alone, expected ring and ulysses, of size 1 where it is not used: diffusers wants both
another mesh -> ValueError: enable_lite_attention: mesh has the ranks [0, 1] in a ring and [0] for Ulysses, expected the ranks [0] in a ring and [0, 1] for Ulysses as the context parallelism that is enabled already, or mesh=None
text in the layers -> ValueError: enable_lite_attention: layers of HunyuanVideoTransformer3DModel attend over text and video together, expected a model with video alone in its self-attention where tokens are split among ranks
no plan -> ValueError: enable_lite_attention: WanVACETransformer3DModel does not say how its tokens can be split (_cp_plan is None), expected mesh=None, or a transformer on which enable_parallelism was called with a cp_plan
a plan that splits text -> ValueError: enable_lite_attention: context parallelism is enabled on LTXVideoTransformer3DModel, by a plan that splits the text too, expected mesh= instead
a plan that fails -> ValueError: enable_lite_attention: diffusers' plan of how to split the tokens of LTX2VideoTransformer3DModel does not work, expected no mesh and no context parallelism
shards of unequal length -> ValueError: enable_lite_attention: context parallelism has ulysses_anything=True, which makes shards of unequal length, expected False and a number of tokens that the ranks divide
tensor parallelism -> ValueError: enable_lite_attention: WanTransformer3DModel is set up for tensor parallelism, expected mesh=None with it
one of two -> RuntimeError: enable_lite_attention: context parallelism is enabled on transformer_2 and not on transformer, expected both or neither
two meshes -> ValueError: enable_lite_attention: context parallelism of one transformer has the ranks [0] in a ring and [0, 1] for Ulysses, of the other the ranks [0, 1] in a ring and [0] for Ulysses, expected the same mesh for both
enabled later -> RuntimeError: blocks.0.attn1: context parallelism was enabled after LiteAttention, expected before it. Call disable() on the handle, then enable_lite_attention again
a mask -> ValueError: blocks.0.attn1: attn_mask has dtype torch.bool and shape [1, 1, 1, 490], expected no mask
an odd must_do -> ValueError: must_do has 1 entries, expected an even number: [start, end, start, end, ...] (entry 0, 1, has no partner)""",
    )


def _errors() -> str:
    mesh, ring = mesh_of("cpu", 1, 2), mesh_of("cpu", 2, 1)
    with inference():
        enabled, uneven, later, ruled = (make_transformer(WAN) for _ in range(4))
        enable_parallelism(enabled, mesh)
        enable_parallelism(uneven, mesh, ulysses_anything=True)
        handle = enable_lite_attention(later)
        enable_parallelism(later, mesh)
        vars(ruled)["_parallel_config"] = ParallelConfig(tensor_parallel_config=TensorParallelConfig(tp_degree=2))
        cases = {name: make_transformer(CASES[name]) for name in ("hunyuan", "wan-vace", "wan", "ltx", "ltx2")}
        enable_parallelism(cases["ltx"], mesh)
        one_of_two, two_meshes = wan(transformers=2), wan(transformers=2)
        enable_parallelism(one_of_two.transformer_2, mesh)
        enable_parallelism(two_meshes.transformer, mesh)
        enable_parallelism(two_meshes.transformer_2, ring)
        only_ulysses = init_device_mesh("cpu", (2,), mesh_dim_names=("ulysses",))
        unnamed = init_device_mesh("cpu", (2,))
        masked, _ = on_mesh(WAN, mesh)
        attn: Any = masked.get_submodule("blocks.0.attn1")
        hidden = torch.randn(1, TOKENS // 2, HEADS * HEAD_DIM)
        mask = torch.ones(1, 1, 1, TOKENS // 2, dtype=torch.bool)
        odd = make_transformer(WAN)
        calls: dict[str, Callable[[], object]] = {
            "not a mesh": lambda: enable_lite_attention(cases["wan"], mesh=2),  # type: ignore[arg-type]
            "a mesh without names": lambda: enable_lite_attention(cases["wan"], mesh=unnamed),
            "a mesh of one dimension": lambda: enable_lite_attention(cases["wan"], mesh=only_ulysses),
            "another mesh": lambda: enable_lite_attention(enabled, mesh=ring),
            "text in the layers": lambda: enable_lite_attention(cases["hunyuan"], mesh=mesh),
            "no plan": lambda: enable_lite_attention(cases["wan-vace"], mesh=mesh),
            "a plan that splits text": lambda: enable_lite_attention(cases["ltx"]),
            "a plan that fails": lambda: enable_lite_attention(cases["ltx2"], mesh=mesh),
            "shards of unequal length": lambda: enable_lite_attention(uneven),
            "tensor parallelism": lambda: enable_lite_attention(ruled, mesh=mesh),
            "one of two": lambda: enable_lite_attention(one_of_two),
            "two meshes": lambda: enable_lite_attention(two_meshes),
            "enabled later": lambda: run(later, WAN, make_latents(WAN), 900.0),
            "a mask": lambda: attn(hidden, None, mask),
            "an odd must_do": lambda: enable_lite_attention(odd, must_do=[1], mesh=mesh),
        }
        text = report(calls)
        for transformer in (*cases.values(), enabled, uneven, ruled, odd):
            assert not any(isinstance(module, LiteAttention) for module in transformer.modules()), "all or nothing"
        assert odd._parallel_config is None, "enabled and disabled again"
        # Context parallelism that came too late is what remains.
        handle.disable()
        dense = run(make_transformer(WAN), WAN, make_latents(WAN), 900.0)
        assert_close([run(later, WAN, make_latents(WAN), 900.0)], [dense], "cpu")
        return text


# torch.compile


@each_device
def test_one_compile_covers_the_repeated_blocks_on_every_rank(device: str) -> None:
    assert run_on_ranks(2, device, _compiled_blocks, device) == [[2], [2]], "the first block also splits the tokens"


def _compiled_blocks(device: str) -> list[int]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with inference():
        transformer = make_transformer(WAN)
        transformer.blocks.extend(copy.deepcopy(list(transformer.blocks)))  # type: ignore[union-attr,operator,arg-type]
        eager = place(copy.deepcopy(transformer), device)
        compiled = place(transformer, device)
        mesh = mesh_of(device, 1, 2)
        handles = [enable_lite_attention(model, THRESHOLD, must_do=[5, 6], mesh=mesh) for model in (eager, compiled)]
        compiled.compile_repeated_blocks(fullgraph=True, backend=counter)
        for step, timestep in enumerate((900.0, 700.0, 500.0, 900.0, 700.0)):
            if step == 4:
                for handle in handles:
                    handle.set_threshold(-1.0)
                    handle.set_must_do([9, 10])
            outs = [call(model, WAN, device, step, timestep) for model in (compiled, eager)]
            assert torch.equal(*outs)
        for layer, other in zip(handles[0].layers.values(), handles[1].layers.values(), strict=True):
            assert torch.equal(layer.keep_map(), other.keep_map())
        assert (handles[1].skip_fraction()[:, 1:] > 0.05).all()
        return [counter.frame_count]
