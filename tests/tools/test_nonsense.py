"""Every public function refuses values that mean nothing, argument by argument, in words that name the argument."""

import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lite_attention import LiteAttention, SkipPolicy, layers, ops
from lite_attention.compat import fastvideo, light_duo
from lite_attention.families import block_sparse, duo, sliding_tile, streaming, video_sparse
from lite_attention.layers import selector
from lite_attention.layers.backends.sliding_tile_attn import SlidingTileAttentionMetadataBuilder
from lite_attention.layers.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
from lite_attention.maps import blocks, keep_map, ranges, tiles, video_tiles


class Kind(NamedTuple):
    """What an argument may be, by what it may not; with a value that is right."""

    nonsense: list[object]
    right: Any = None

    def of(self, right: object) -> "Kind":
        return self._replace(right=right)

    def or_none(self, right: object = None) -> "Kind":
        return Kind([value for value in self.nonsense if value is not None], right)


class Call(NamedTuple):
    name: str
    function: Callable[..., object]
    arguments: dict[str, Kind]


SOMETHING = object()
TENSOR = Kind([None, "x", 3, True, [1.0], SOMETHING])
TENSORS = Kind([None, "x", 3, True, [], ["x", "x"], [None, None]])
INT = Kind([None, "x", 1.5, True, [1], math.nan, torch.tensor(1), SOMETHING])
SIZE = Kind([*INT.nonsense, -1, -(2**40), -(2**70)])
NUMBER = Kind([None, "x", True, [1.0], 1j, SOMETHING])
BOOL = Kind([None, "no", 0, 1, 1.0, [], SOMETHING])
DTYPE = Kind([None, "x", 3, torch.int32, SOMETHING])
DEVICE = Kind(["x", 1.5, [1], SOMETHING])
TRIPLE = Kind(
    [None, 3, "x", (1, 2), (1, 2, 0), (-4, -4, 4), (1.0, 2, 3), (True, 2, 2), ("a", "b", "c"), SOMETHING], (4, 4, 4)
)
PAIR = Kind([None, 3, "x", (1,), (1, 2, 3), (-1, 0), (1.5, 0), (True, 0), (4, True), (4, 1), ("x", 0), SOMETHING])
TENSOR_PAIR = Kind([3, "xy", (1,), (1, 2), (torch.ones(3), torch.ones(3)), SOMETHING])
POSITIONS = Kind([3, "x", [1], [1, "x"], [0, True], [0, -1], [0, 1.0], [None, None], SOMETHING])
RANGES = Kind([None, 3, "x", [1], [(1,)], [(1, "x")], [(0.0, 1)], torch.zeros(2), torch.zeros(1, 2), SOMETHING])
TABLE = Kind([None, 3, "x", [], [[1]], [[1, 2]], [[1, 0], [1, 0]], [["x", "y"]], [[math.nan, 0]], SOMETHING], [[1, 0]])
NAME = Kind([3, True, "x", SOMETHING])
NAMES = Kind([3, "LITE_ATTN", [], ["x"], [3], SOMETHING])
TEXT = Kind([None, 3, True, SOMETHING])


def tokens(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


X = tokens(1, 128, 2, 64)
QKV = {name: TENSOR.of(X) for name in "qkv"}
BHSD = {name: TENSOR.of(X.transpose(1, 2)) for name in "qkv"}
SCALE = {"scale": NUMBER.or_none()}
HEAD = {"head_dim": SIZE.of(64), "dtype": DTYPE.of(torch.float32)}
LENGTHS = {"query_len": SIZE.of(128), "kv_len": SIZE.of(128), **HEAD, "tile_n": SIZE.or_none()}
MAP_SIZES = {"batch": SIZE.of(1), "heads": SIZE.of(2), **LENGTHS}
BLOCK_SIZES = TENSOR.of(torch.tensor([64, 64], dtype=torch.int32))
BLOCK_MAP = TENSOR.of(torch.ones(1, 2, 2, 2, dtype=torch.bool))
VOLUME = {"volume": SIZE.of(64)}


def call(function: Callable[..., object], name: str = "", **arguments: Kind) -> Call:
    return Call(name or getattr(function, "__qualname__", ""), function, arguments)


def calls_of_ops() -> Iterator[Call]:
    keep = keep_map.full_keep_map(1, 2, 128, 128, 64, torch.float32)
    optional = {name: TENSOR.or_none() for name in ("keep", "kv_lens", "kv_tile_lens", "head_windows")}
    yield call(ops.attention, **QKV, **SCALE, **optional, tile_n=SIZE.or_none(), causal=NAME)
    optional = {name: TENSOR.or_none() for name in ("must_keep", "kv_lens")}
    yield call(ops.skip_attention, **QKV, **SCALE, **optional, keep=TENSOR.of(keep), threshold=NUMBER.of(-1.0))
    yield call(ops.merge_attention, outs=TENSORS.of([X, X]), lses=TENSORS.of([torch.zeros(1, 2, 128)] * 2))
    yield call(ops.top_k_map, scores=TENSOR.of(tokens(3, 40)), count=SIZE.of(3))


def calls_of_maps() -> Iterator[Call]:
    packed = TENSOR.of(torch.ones(2, 1, dtype=torch.int32))
    yield call(tiles.tile_shape, **HEAD)
    yield call(tiles.visit_rows, **HEAD)
    yield call(keep_map.tile_counts, **LENGTHS)
    yield call(keep_map.keep_map_shape, **MAP_SIZES)
    yield call(keep_map.full_keep_map, **MAP_SIZES, device=DEVICE)
    yield call(keep_map.pack_keep_map, keep=TENSOR.of(torch.ones(3, 40, dtype=torch.bool)))
    for function in (keep_map.unpack_keep_map, keep_map.kept_tiles, keep_map.density):
        yield call(function, packed=packed, kv_tiles=SIZE.of(1))
    yield call(ranges.parse_ranges, ranges=POSITIONS.of([0, 3]), length=SIZE.of(10))
    for function in (ranges.tiles_touched, ranges.tiles_inside):
        yield call(function, ranges=RANGES.of([(0, 3)]), kv_len=SIZE.of(100), tile_n=SIZE.of(64))
    yield call(blocks.topk_of_sparsity, sparsity=NUMBER.of(0.5), blocks=SIZE.of(3))
    yield call(blocks.block_means, x=TENSOR.of(X), sizes=BLOCK_SIZES, **VOLUME)
    means = {name: TENSOR.of(tokens(1, 4, 2, 64)) for name in ("q_means", "k_means")}
    yield call(blocks.block_scores, **means, scale=NUMBER.of(1.0))
    yield call(blocks.choose_blocks, **means, scale=NUMBER.of(1.0), topk=SIZE.of(2), prefix_blocks=SIZE.of(0))
    yield call(blocks.expand_blocks, block_map=BLOCK_MAP, **VOLUME)
    yield call(blocks.block_tile_lens, sizes=BLOCK_SIZES, **VOLUME)
    yield call(video_tiles.VideoTiles, grid=TRIPLE, tile=TRIPLE)
    grid = video_tiles.VideoTiles((4, 4, 8), (4, 4, 4))
    of_grid = {"x": TENSOR.of(tokens(1, 128)), "tiles": TENSOR.of(grid), "dim": INT.of(1)}
    yield call(video_tiles.tile_tokens, **of_grid)
    yield call(video_tiles.untile_tokens, **of_grid)
    yield call(video_tiles.pad_tiles, **of_grid, block=SIZE.of(64))
    yield call(video_tiles.unpad_tiles, **of_grid, block=SIZE.of(64))


def calls_of_families() -> Iterator[Call]:
    fine = keep_map.full_keep_map(1, 2, 128, 128, 64, torch.float32, tile_n=64)
    yield call(block_sparse.attention, "block_sparse", **QKV, **SCALE, keep=TENSOR.of(fine), block_sizes=BLOCK_SIZES)
    yield call(
        video_sparse.attention,
        "video_sparse",
        **QKV,
        **SCALE,
        **VOLUME,
        block_sizes=BLOCK_SIZES,
        topk=SIZE.of(1),
        gate=TENSOR.or_none(),
        q_block_sizes=TENSOR.or_none(),
        prefix_blocks=SIZE.of(0),
    )
    windows = sliding_tile.sliding_tile_map(
        (1, 1, 1), (4, 4, 4), tile=(4, 4, 4), text_tokens=64, head_dim=64, dtype=torch.float32
    )
    of_windows = {"windows": TENSOR.of(windows), "text_length": SIZE.or_none()}
    yield call(sliding_tile.attention, "sliding_tile", **QKV, **SCALE, **of_windows)
    yield call(sliding_tile.attention_in_slots, **QKV, **SCALE, **of_windows)
    of_canvas = {"window_size": TRIPLE, "seq_shape": TRIPLE, "tile": TRIPLE}
    yield call(sliding_tile.sliding_tile_map, **HEAD, **of_canvas, text_tokens=SIZE.of(0), device=DEVICE)
    sizes = {"sink_size": SIZE.of(4), "recent_size": SIZE.of(4)}
    optional = {"full_heads": TENSOR.or_none(), "kv_lens": TENSOR.or_none()}
    yield call(streaming.attention, "streaming", **QKV, **SCALE, **sizes, **optional, causal=NAME.of("top-left"))
    yield call(streaming.head_windows, **sizes, full_heads=TENSOR.of(torch.tensor([True, False])))


def language_model() -> nn.Module:
    """A decoder of one layer, of 4 query heads and 2 KV heads of 8."""
    layer, model = nn.Module(), nn.Module()
    layer.self_attn = nn.Module()
    for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16), ("o_proj", 32)):
        setattr(layer.self_attn, name, nn.Linear(32, rows))
    model.layers = nn.ModuleList([layer])
    return model


def calls_of_duo() -> Iterator[Call]:
    gates = {"full_attention_heads": TENSOR.of(tokens(3, 4))}
    yield call(duo.sparsify_attention_heads, **gates, sparsity=NUMBER.of(0.5))
    yield call(duo.sparsify_attention_heads, "sparsify_attention_heads by threshold", **gates, threshold=NUMBER.of(0.5))
    sizes = {"sink_size": SIZE.of(4), "recent_size": SIZE.of(4)}
    yield call(partial(duo.save_duo_pattern, tempfile.mkdtemp()), "save_duo_pattern", **gates, **sizes)
    heads = {"num_attention_heads": SIZE.of(4), "num_key_value_heads": SIZE.of(2), "hidden_size": SIZE.of(32)}
    heads |= {"full_attention_heads": TABLE, "device": DEVICE}
    yield call(partial(duo.reorder_weights, language_model()), "reorder_weights", **heads)
    reorder = partial(light_duo.reorder_weights_for_duo_attn, language_model())
    yield call(reorder, "reorder_weights_for_duo_attn", **heads, **sizes)


def calls_of_compat() -> Iterator[Call]:
    yield call(
        fastvideo.sliding_tile_attention,
        **BHSD,
        **SCALE,
        window_size=TRIPLE.of((1, 1, 1)),
        text_length=SIZE.or_none(64),
        has_text=BOOL.of(True),
        seq_shape=TRIPLE,
        tile=TRIPLE,
    )
    yield call(fastvideo.build_vsa_metadata, shape=TRIPLE, tile=TRIPLE, device=DEVICE)
    yield call(fastvideo.block_sparse_attention, **BHSD, **SCALE, block_map=BLOCK_MAP, block_sizes=BLOCK_SIZES)
    yield call(
        fastvideo.video_sparse_attn,
        **BHSD,
        **SCALE,
        variable_block_sizes=BLOCK_SIZES,
        topk=SIZE.of(1),
        block_size=TRIPLE,
        compress_attn_weight=TENSOR.or_none(),
        q_variable_block_sizes=TENSOR.or_none(),
        prefix_blocks=SIZE.of(0),
    )
    yield call(
        light_duo.streaming_sparse_attn_func,
        **QKV,
        softmax_scale=NUMBER.or_none(),
        causal=BOOL.of(True),
        window_size=PAIR.of((4, 0)),
        sink_size=SIZE.or_none(4),
        enable_streaming=BOOL.of(True),
        seqused_k=TENSOR.or_none(),
    )


def calls_of_layers() -> Iterator[Call]:
    arguments = {
        "num_heads": SIZE.of(2),
        "head_size": SIZE.of(64),
        "num_kv_heads": Kind([*SIZE.or_none().nonsense, 0, 3]),
        "softmax_scale": NUMBER.or_none(),
        "causal": BOOL.of(False),
        "prefix": TEXT.of("blocks.0.attn"),
        "dtype": DTYPE.or_none(torch.float32),
        "supported_attention_backends": NAMES,
    }
    for layer in (layers.LocalAttention, layers.DistributedAttention, layers.DistributedAttention_VSA):
        yield call(layer, **arguments)
    yield call(layers.LocalAttention(2, 64, dtype=torch.float32), "LocalAttention()", **QKV, freqs_cis=TENSOR_PAIR)
    shared = layers.DistributedAttention(2, 64, dtype=torch.float32)
    text = {f"replicated_{name}": TENSOR.or_none() for name in "qkv"}
    more = {"freqs_cis": TENSOR_PAIR, "original_seq_len": SIZE.or_none()}
    yield call(shared, "DistributedAttention()", **QKV, **text, **more)
    of_backend = {"head_size": SIZE.of(64), "dtype": DTYPE.of(torch.float32), "supported_attention_backends": NAMES}
    yield call(selector.get_attn_backend, **of_backend, default_backend=NAME.of("LITE_ATTN"))
    yield call(selector.backend_name_to_enum, backend_name=NAME.of("LITE_ATTN"))
    yield call(selector.global_force_attn_backend, attn_backend=NAME)
    yield call(selector.global_force_attn_backend_context_manager, attn_backend=NAME)
    yield call(
        partial(VideoSparseAttentionMetadataBuilder().build, current_timestep=0),
        "VideoSparseAttentionMetadataBuilder.build",
        raw_latent_shape=TRIPLE,
        patch_size=TRIPLE.of((1, 1, 1)),
        VSA_sparsity=NUMBER.of(0.5),
        device=DEVICE,
    )
    yield call(
        SlidingTileAttentionMetadataBuilder().build,
        STA_param=TRIPLE.of([[[(1, 1, 1)]]]),
        current_timestep=SIZE.of(0),
        canvas=TRIPLE,
        head_size=SIZE.of(64),
        dtype=DTYPE.of(torch.float32),
        tile=TRIPLE,
        text_tokens=SIZE.of(0),
        text_length=SIZE.or_none(),
        device=DEVICE,
    )


def calls_of_skipping() -> Iterator[Call]:
    yield call(
        LiteAttention,
        enable_skipping=Kind([value for value in BOOL.nonsense if value is not None]),
        threshold=NUMBER.or_none(),
        max_batch_size=SIZE.of(4),
    )
    layer = LiteAttention(threshold=-1.0)
    names = {name: TENSOR.of(X) for name in ("query", "key", "value")}
    optional = {name: TENSOR.or_none() for name in ("start_full", "generation", "skip_fraction_out", "kv_lens")}
    yield call(
        layer,
        "LiteAttention()",
        **names,
        **SCALE,
        **optional,
        return_softmax_lse=BOOL.of(False),
        branch=SIZE.or_none(),
        must_do_list=POSITIONS,
        must_skip_list=POSITIONS,
        must_do_queries=POSITIONS,
    )
    yield call(SkipPolicy, threshold=NUMBER.of(-1.0), dense_steps=SIZE.of(0), enabled=BOOL.of(True))


ROOMS = {
    "ops": calls_of_ops,
    "maps": calls_of_maps,
    "families": calls_of_families,
    "duo": calls_of_duo,
    "compat": calls_of_compat,
    "layers": calls_of_layers,
    "skipping": calls_of_skipping,
}


@pytest.mark.parametrize("room", ROOMS)
def test_nonsense_is_refused_by_the_name_of_its_argument(room: str) -> None:
    wrong = []
    for name, function, arguments in ROOMS[room]():
        right = {argument: kind.right for argument, kind in arguments.items()}
        for argument, kind in arguments.items():
            for value in kind.nonsense:
                call = f"{name}({argument}={value!r})"
                try:
                    function(**right | {argument: value})
                except (TypeError, ValueError, RuntimeError) as error:
                    if argument.split("_")[-1] not in str(error):
                        wrong.append(f"{call} -> {type(error).__name__}: {str(error).splitlines()[0]}")
                except Exception as error:
                    wrong.append(f"{call} -> {type(error).__name__}: {error}")
                else:
                    wrong.append(f"{call} is taken")
        function(**right)  # which the nonsense has not spoilt
    assert not wrong, "\n".join(wrong)


def test_scalars_of_numpy_are_numbers() -> None:
    one, tile, sizes = np.int64(1), np.int32(64), torch.tensor([64, 64], dtype=torch.int32)
    for plain, of_numpy in (
        (ops.attention(X, X, X, scale=0.5, tile_n=64), ops.attention(X, X, X, scale=np.float32(0.5), tile_n=tile)),
        (video_sparse.attention(X, X, X, sizes, 1), video_sparse.attention(X, X, X, sizes, one, volume=tile)),
        (streaming.attention(X, X, X, 1, 64), streaming.attention(X, X, X, one, tile)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(plain, of_numpy, strict=True))
    keep = keep_map.full_keep_map(one, one, tile, tile, tile, torch.float32)
    assert torch.equal(keep, keep_map.full_keep_map(1, 1, 64, 64, 64, torch.float32))
    assert torch.equal(ops.top_k_map(tokens(3, 40), one), ops.top_k_map(tokens(3, 40), 1))
    assert ranges.parse_ranges([one, tile], 100) == [(1, 64)]
    assert tiles.tile_shape(tile, torch.float32) == tiles.tile_shape(64, torch.float32)
    assert video_tiles.VideoTiles((one, one, tile), (1, 1, 4)) == video_tiles.VideoTiles((1, 1, 64), (1, 1, 4))
    layer = layers.LocalAttention(np.int64(2), tile, softmax_scale=np.float64(0.5))
    assert (layer.num_heads, layer.head_size, layer.softmax_scale) == (2, 64, 0.5)
    for wrong in (np.bool_(True), np.float32(1.0)):
        with pytest.raises(TypeError, match=r"^top_k_map: count has type \w+, expected an int$"):
            ops.top_k_map(tokens(3, 40), wrong)  # type: ignore[arg-type]
