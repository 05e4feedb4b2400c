"""The transformers door, on transformers' own decoders."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import sdpa_mask

from lite_attention import reorder_weights_for_duo_attn
from lite_attention.families.duo import restore_weights
from lite_attention.integrations.transformers import enable_duo_attention
from support.inputs import report
from support.language_models import ALL_FULL, LAYERS, MAKERS, MIXED, make_model, make_tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES)
every_model = pytest.mark.parametrize("name", MAKERS)
SINK, RECENT = 4, 31
# Of logits that windows move by 5. Whole models in bf16 differ from each other by 0.15 where only the order of sums does.
TOLERANCE = {"cpu": 1e-3, "cuda": 0.5}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def on(device: str, model: Any) -> Any:
    return model.to(device, DTYPE[device])


def dense_oracle(model: Any, heads: Any) -> Any:
    """A copy of the model whose layers build the whole mask of every head."""
    model = copy.deepcopy(model)
    for layer, row in zip(model.model.layers, heads, strict=True):
        layer.self_attn.oracle_row = list(row)

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        # Places among the tokens that exist, for each batch entry: the last query row sees all of its keys.
        exists = attention_mask[:, 0, -1]
        place = exists.cumsum(-1) - 1
        own = place[:, -query.shape[2] :, None]
        window = (place[:, None] < SINK) | (place[:, None] > own - RECENT)
        allowed = [attention_mask[:, 0] if full else attention_mask[:, 0] & window for full in module.oracle_row]
        mask = torch.stack(allowed, 1).repeat_interleave(group, 1)
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -math.inf)
        return (scores.softmax(-1).nan_to_num(0) @ value).transpose(1, 2), None

    def whole_mask(*args: Any, **kwargs: Any) -> Tensor:
        return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})  # type: ignore[return-value]

    AttentionInterface.register("dense_oracle", attend)
    AttentionMaskInterface.register("dense_oracle", whole_mask)
    model.set_attn_implementation("dense_oracle")
    return model


def assert_close(device: str, result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, atol=TOLERANCE[device], rtol=0)


@every_model
@on_every_device
def test_full_heads_give_what_sdpa_gives(device: str, name: str) -> None:
    model = on(device, make_model(name))
    tokens = make_tokens().to(device)
    expected = model(tokens).logits
    enable_duo_attention(model, ALL_FULL, SINK, RECENT)
    assert_close(device, model(tokens).logits, expected)


@every_model
@on_every_device
def test_mixed_heads_give_what_a_dense_mask_gives(device: str, name: str) -> None:
    model = on(device, make_model(name))
    tokens = make_tokens().to(device)
    plain, expected = model(tokens).logits, dense_oracle(model, MIXED)(tokens).logits
    assert float((plain - expected).abs().max()) > 4 * TOLERANCE[device], "the windows are meant to matter"
    enable_duo_attention(model, MIXED, SINK, RECENT)
    assert_close(device, model(tokens).logits, expected)


@every_model
def test_a_reordered_model_with_its_table_reordered_gives_the_same(name: str) -> None:
    model = make_model(name)
    tokens = make_tokens()
    config = model.config
    twin = copy.deepcopy(model)
    enable_duo_attention(twin, MIXED, SINK, RECENT)
    expected = twin(tokens).logits
    reorder_weights_for_duo_attn(
        model, MIXED, SINK, RECENT, config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    )
    enable_duo_attention(model, [sorted(row, reverse=True) for row in MIXED], SINK, RECENT)
    assert_close("cpu", model(tokens).logits, expected)


@on_every_device
def test_chunks_and_single_tokens_give_what_one_forward_gives(device: str) -> None:
    model = on(device, make_model())
    tokens = make_tokens().to(device)
    enable_duo_attention(model, MIXED, SINK, RECENT)
    expected = model(tokens).logits
    cache, start = DynamicCache(), 0
    for end in (100, 101, 160, 199, 200):
        logits = model(tokens[:, start:end], past_key_values=cache).logits
        assert_close(device, logits, expected[:, start:end])
        start = end


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 9])
@on_every_device
def test_generated_tokens_are_those_of_full_forwards(device: str, padding: int, cache: str) -> None:
    model = make_model().to(device)  # in fp32 no two logits are near each other by rounding
    if device == "cuda":
        model = model.half()
    oracle = dense_oracle(model, MIXED)
    enable_duo_attention(model, MIXED, SINK, RECENT)
    prompt = make_tokens(length=50).to(device)
    mask = torch.ones_like(prompt)
    mask[0, :padding] = 0
    generated = model.generate(
        prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation=cache, disable_compile=True
    )
    assert generated.shape == (2, 58)
    for entry in range(2):
        alone = generated[entry : entry + 1, int((mask[entry] == 0).sum()) :]
        logits = oracle(alone).logits[0, -9:-1]
        chosen = logits.gather(-1, alone[0, -8:, None]).squeeze(-1)
        # Greedy choices, up to logits that rounding cannot tell apart.
        assert (chosen >= logits.max(-1).values - TOLERANCE[device]).all()


@pytest.mark.parametrize("left", [0, 7])
@pytest.mark.parametrize("right", [0, 13])
@on_every_device
def test_padding_is_not_seen_and_moves_no_sink(device: str, left: int, right: int) -> None:
    model = on(device, make_model())
    tokens = make_tokens(batch=3, length=120).to(device)
    mask = torch.ones_like(tokens)
    mask[0, :left] = 0
    mask[1, 120 - right :] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    oracle = dense_oracle(model, MIXED)
    enable_duo_attention(model, MIXED, SINK, RECENT)
    logits = model(tokens, attention_mask=mask, position_ids=positions).logits
    for entry in range(3):
        alone = tokens[entry][mask[entry].bool()][None]
        assert_close(device, logits[entry][mask[entry].bool()], oracle(alone).logits[0])


@on_every_device
def test_tokens_after_a_gap_continue_those_before_it(device: str) -> None:
    model = on(device, make_model())
    tokens = make_tokens(length=120).to(device)
    mask = torch.ones_like(tokens)
    mask[0, 80:100] = 0  # a prompt padded on the right, and what followed it
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    oracle = dense_oracle(model, MIXED)
    enable_duo_attention(model, MIXED, SINK, RECENT)
    cache, logits = DynamicCache(), []
    for start, end in ((0, 70), (70, 100), (100, 119), (119, 120)):
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        logits.append(model(tokens[:, start:end], past_key_values=cache, **given).logits)
    for entry, all_logits in enumerate(torch.cat(logits, 1)):
        exists = mask[entry].bool()
        assert_close(device, all_logits[exists], oracle(tokens[entry][exists][None]).logits[0])


def places(start: int, end: int, device: str) -> dict[str, Tensor]:
    """What transformers 4 must be told where the cache does not say it by its size."""
    is_old = transformers.__version__.startswith("4.")
    return {"cache_position": torch.arange(start, end, device=device)} if is_old else {}


@pytest.mark.parametrize("mask_length", [None, "seen", "whole cache"])
@on_every_device
def test_a_static_caches_free_room_is_not_seen(device: str, mask_length: str | None) -> None:
    model = on(device, make_model())
    tokens = make_tokens().to(device)
    padding = 0 if mask_length is None else 9
    mask = torch.ones(2, 300, dtype=torch.long, device=device)
    mask[:, :padding] = 0
    expected = dense_oracle(model, MIXED)(tokens[:, padding:]).logits
    enable_duo_attention(model, MIXED, SINK, RECENT)
    cache = StaticCache(config=model.config, max_cache_len=300)
    for start, end in ((0, 150), (150, 151), (151, 200)):
        given: dict[str, Tensor] = places(start, end, device)
        if mask_length is not None:
            given["attention_mask"] = mask[:, :end] if mask_length == "seen" else mask
            given["position_ids"] = (torch.arange(start, end, device=device) - padding).clamp(min=0)[None]
        logits = model(tokens[:, start:end], past_key_values=cache, **given).logits
        first = max(start, padding)
        assert_close(device, logits[:, first - start :], expected[:, first - padding : end - padding])


def test_the_layers_own_scale_is_used() -> None:
    model = make_model()
    tokens = make_tokens()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.1
    expected = dense_oracle(model, MIXED)(tokens).logits
    enable_duo_attention(model, MIXED, SINK, RECENT)
    assert_close("cpu", model(tokens).logits, expected)


def test_disable_gives_the_models_own_attention_back() -> None:
    model = make_model()
    tokens = make_tokens()
    expected, before = model(tokens).logits, set(dict(model.named_buffers()))
    handle = enable_duo_attention(model, MIXED, SINK, RECENT)
    keys = set(model.state_dict())
    assert not torch.equal(model(tokens).logits, expected)
    handle.disable()
    handle.disable()
    assert torch.equal(model(tokens).logits, expected)
    assert model.config._attn_implementation == "sdpa"
    assert set(dict(model.named_buffers())) == before
    assert set(model.state_dict()) == keys, "the table is not saved"
    enable_duo_attention(model, MIXED, SINK, RECENT)


def _pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, _pickled])
def test_a_copy_works_as_its_model_and_goes_back_by_its_own_handle(copy_of: Callable[[Any], Any]) -> None:
    model, tokens = make_model(), make_tokens()
    dense = model(tokens).logits
    handle = enable_duo_attention(model, MIXED, SINK, RECENT)
    streaming = model(tokens).logits
    alone, (twin, its_handle) = copy_of(model), copy_of((model, handle))
    its_handle.disable()
    assert torch.equal(twin(tokens).logits, dense)
    assert torch.equal(model(tokens).logits, streaming)
    handle.disable()
    assert torch.equal(alone(tokens).logits, streaming)
    with pytest.raises(ValueError, match="disabled by the handle copied with it"):
        enable_duo_attention(alone, MIXED, SINK, RECENT)


@pytest.mark.parametrize("how", ["one layer twice", "a weight of two layers"])
def test_layers_in_common_share_their_row(how: str) -> None:
    model = make_model()
    layers = model.model.layers
    if how == "one layer twice":
        layers[1] = layers[0]
        with pytest.raises(
            ValueError, match=r"layers.1.self_attn is \[1, 0, 0, 0\], expected \[0, 1, 0, 1\] as for layers"
        ):
            enable_duo_attention(model, MIXED, SINK, RECENT)
        assert model.config._attn_implementation == "sdpa"
    else:
        layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    heads = (MIXED[0], MIXED[0] if how == "one layer twice" else MIXED[1])
    tokens, given = make_tokens(), {"use_cache": False}  # the cache, too, would be one
    given["attention_mask"] = torch.ones_like(tokens)
    before, expected = model(tokens, **given).logits, dense_oracle(model, heads)(tokens, **given).logits
    handle = enable_duo_attention(model, heads, SINK, RECENT)
    assert_close("cpu", model(tokens, **given).logits, expected)
    handle.disable()
    assert torch.equal(model(tokens, **given).logits, before)


class Offloaded:
    """Keeps a module's weights elsewhere between its calls, as accelerate does, with or without accelerate."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {name: weight.data for name, weight in module.named_parameters(recurse=False)}
        module.register_forward_pre_hook(self.load)
        module.register_forward_hook(self.unload)
        self.unload(module)

    def load(self, module: nn.Module, _: Any) -> None:
        for name, weight in self.weights.items():
            setattr(module, name, nn.Parameter(weight, requires_grad=False))

    def unload(self, module: nn.Module, *_: Any) -> None:
        for name, weight in self.weights.items():
            setattr(module, name, nn.Parameter(weight.to("meta"), requires_grad=False))


@pytest.mark.parametrize("by_accelerate", [False, True])
@on_every_device
def test_the_table_is_where_the_queries_are_whatever_the_weights_say(device: str, by_accelerate: bool) -> None:
    model = make_model().to(DTYPE[device])
    tokens = make_tokens().to(device)
    expected = dense_oracle(model, MIXED).to(device)(tokens).logits
    if by_accelerate:
        pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device(device))
    else:
        model = model.to(device)
        for module in model.modules():
            Offloaded(module)
    enable_duo_attention(model, MIXED, SINK, RECENT)
    for _ in range(2):
        assert_close(device, model(tokens).logits, expected)


def test_the_table_is_nothing_that_loading_or_casting_a_model_touches() -> None:
    model = make_model()
    tokens, weights = make_tokens(), copy.deepcopy(model.state_dict())
    expected = dense_oracle(model, MIXED)(tokens).logits
    enable_duo_attention(model, MIXED, SINK, RECENT)
    model.to("meta")
    rotary = make_model().model.rotary_emb  # whose buffers transformers itself loses on meta
    model.to_empty(device="cpu").load_state_dict(weights)
    model.model.rotary_emb = rotary
    for layer in model.model.layers:
        for _, buffer in layer.named_buffers():
            buffer.zero_()
    assert_close("cpu", model(tokens).logits, expected)


def test_models_of_one_process_have_tables_of_their_own() -> None:
    tokens = make_tokens()
    expected, models = [], []
    for heads in (MIXED, ALL_FULL):
        models.append(make_model())
        expected.append(dense_oracle(models[-1], heads)(tokens).logits)
        enable_duo_attention(models[-1], heads, SINK, RECENT)
    for model, logits in zip(models, expected, strict=True):
        assert_close("cpu", model(tokens).logits, logits)


def test_autocast_gives_attention_the_dtype_it_gives_torch() -> None:
    model = make_model()
    tokens = make_tokens()
    # Without a cache, which would make them alike, queries and keys come from the rotary embedding in fp32, values in bf16.
    given = {"attention_mask": torch.ones_like(tokens), "use_cache": False}
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens, **given).logits
        enable_duo_attention(model, ALL_FULL, SINK, RECENT)
        out = model(tokens, **given).logits
    assert float((out - expected).norm() / expected.norm()) < 0.05


# torch.compile


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@on_every_device
def test_a_compiled_prefill_is_one_graph(device: str, name: str) -> None:
    counter = CompileCounter()
    model = on(device, make_model(name))
    enable_duo_attention(model, MIXED, SINK, RECENT)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        tokens = make_tokens(seed=seed).to(device)
        assert_close(device, compiled(tokens).logits, model(tokens).logits)
    assert counter.frame_count == 1


@on_every_device
def test_compiled_padding_is_one_graph_however_much_there_is(device: str) -> None:
    counter = CompileCounter()
    model = on(device, make_model())
    enable_duo_attention(model, MIXED, SINK, RECENT)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    tokens = make_tokens().to(device)
    for padding in (5, 0, 20):
        mask = torch.ones_like(tokens)
        mask[0, :padding] = 0
        logits, expected = (run(tokens, attention_mask=mask).logits for run in (compiled, model))
        assert_close(device, logits[mask.bool()], expected[mask.bool()])
    assert counter.frame_count == 1


@on_every_device
def test_compiled_decoding_into_a_static_cache_is_one_graph(device: str) -> None:
    counter = CompileCounter()
    model = on(device, make_model())
    tokens = make_tokens().to(device)
    expected = dense_oracle(model, MIXED)(tokens).logits
    enable_duo_attention(model, MIXED, SINK, RECENT)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    cache = StaticCache(config=model.config, max_cache_len=300)
    model(tokens[:, :190], past_key_values=cache, **places(0, 190, device))
    for token in range(190, 200):
        logits = compiled(tokens[:, token, None], past_key_values=cache, **places(token, token + 1, device)).logits
        assert_close(device, logits[:, 0], expected[:, token])
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("padding", [0, 10])
def test_compiled_decoding_with_a_growing_cache_gives_what_eager_gives(padding: int, dynamic: bool | None) -> None:
    model = make_model()
    enable_duo_attention(model, MIXED, SINK, RECENT)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
    tokens = make_tokens(length=60)
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    caches = DynamicCache(), DynamicCache()
    start = 0
    for end in (1, 40, 41, 42, 45, 60):
        if start == 0 and padding:
            end = 40  # a first entry of padding alone has nothing to say
        if end <= start:
            continue
        given = {"attention_mask": mask[:, :end], "use_cache": True}
        logits, expected = (
            run(tokens[:, start:end], past_key_values=cache, **given).logits
            for run, cache in zip((compiled, model), caches, strict=True)
        )
        assert_close("cpu", logits[mask[:, start:end].bool()], expected[mask[:, start:end].bool()])
        start = end


def test_one_compile_covers_the_layers_compiled_one_by_one() -> None:
    counter = CompileCounter()
    model = make_model()
    tokens = make_tokens()
    given = {"attention_mask": torch.ones_like(tokens), "use_cache": False}  # a cache is chosen by the layer's number
    enable_duo_attention(model, MIXED, SINK, RECENT)
    expected = model(tokens, **given).logits
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        assert_close("cpu", model(tokens, **given).logits, expected)
    assert counter.frame_count == 1


def test_other_heads_do_not_recompile() -> None:
    counter = CompileCounter()
    model = make_model()
    tokens = make_tokens()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for heads in (MIXED, ALL_FULL):
        expected = dense_oracle(model, heads)(tokens).logits
        handle = enable_duo_attention(compiled, heads, SINK, RECENT)
        assert_close("cpu", compiled(tokens).logits, expected)
        handle.disable()
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_a_captured_prefill_gives_what_eager_gives() -> None:
    model = on("cuda", make_model())
    tokens = make_tokens().cuda()
    enable_duo_attention(model, MIXED, SINK, RECENT)

    def run() -> Tensor:
        logits: Tensor = model(tokens, use_cache=True).logits
        return logits

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    tokens.copy_(make_tokens(seed=1))
    graph.replay()
    assert torch.equal(captured, run())


# What is refused


def test_errors_of_enabling() -> None:
    def twice() -> None:
        model = make_model()
        enable_duo_attention(model, MIXED, SINK, RECENT)
        enable_duo_attention(model, MIXED, SINK, RECENT)

    def one_config_for_two() -> None:
        model = make_model()
        other = type(model)(model.config)
        enable_duo_attention(model, MIXED, SINK, RECENT)
        enable_duo_attention(other, MIXED, SINK, RECENT)

    def reordered(heads: Any, enabled: bool = False) -> Callable[[], object]:
        def call() -> None:
            model = make_model()
            if enabled:
                enable_duo_attention(model, MIXED, SINK, RECENT)
            reorder_weights_for_duo_attn(model, MIXED, SINK, RECENT, 8, 4, 64)
            enable_duo_attention(model, heads, SINK, RECENT)

        return call

    def restored_while_enabled() -> None:
        model = make_model()
        reorder_weights_for_duo_attn(model, ALL_FULL, SINK, RECENT, 8, 4, 64)
        enable_duo_attention(model, ALL_FULL, SINK, RECENT)
        restore_weights(model)

    calls: dict[str, Callable[[], object]] = {
        "not of transformers": lambda: enable_duo_attention(nn.Linear(3, 3), MIXED, SINK, RECENT),
        "one layer": lambda: enable_duo_attention(make_model(), MIXED[:1], SINK, RECENT),
        "one a query head": lambda: enable_duo_attention(make_model(), torch.ones(LAYERS, 8), SINK, RECENT),
        "gates": lambda: enable_duo_attention(make_model(), torch.full((LAYERS, 4), 0.5), SINK, RECENT),
        "no recent token": lambda: enable_duo_attention(make_model(), MIXED, SINK, 0),
        "twice": twice,
        "one config for two": one_config_for_two,
        "old table after reordering": reordered(MIXED),
        "reordering when enabled": reordered(MIXED, enabled=True),
        "restoring when enabled": restored_while_enabled,
    }
    assert_expected_inline(
        report(calls),
        """\
not of transformers -> TypeError: enable_duo_attention: model is a Linear, expected one of transformers
one layer -> ValueError: enable_duo_attention: full_attention_heads has 1 rows, expected 2, one a layer
one a query head -> ValueError: enable_duo_attention: full_attention_heads[0] has 8 heads, expected 4, one a KV head
gates -> ValueError: enable_duo_attention: full_attention_heads[0][0] is 0.5, expected 0 or 1; sparsify_attention_heads makes such a table
no recent token -> ValueError: head_windows: recent_size is 0, expected 1 to 2147483647 keys
twice -> ValueError: enable_duo_attention: layers.0.self_attn has DuoAttention already, expected none: disable it first. A copy of a model is disabled by the handle copied with it, copy.deepcopy((model, handle))
one config for two -> ValueError: enable_duo_attention: model has the config of another LlamaForCausalLM, in which DuoAttention is enabled, expected a config of its own: copy.deepcopy makes one before the model is built
old table after reordering -> ValueError: enable_duo_attention: full_attention_heads of layers.0.self_attn is [0, 1, 0, 1], expected full heads first: duo.reorder_weights has moved them there
reordering when enabled -> RuntimeError: duo.reorder_weights: DuoAttention is enabled in layers.0.self_attn, expected it to be off: its table fits the present heads
restoring when enabled -> RuntimeError: duo.restore_weights: DuoAttention is enabled in layers.0.self_attn, expected it to be off: its table fits the present heads""",
    )


def test_errors_of_calls() -> None:
    tokens = make_tokens()
    causal = torch.ones(2, 1, 200, 200, dtype=torch.bool).tril()

    def call(
        change: Callable[[Any], object] = lambda _: None, name: str = "llama", **given: Any
    ) -> Callable[[], object]:
        def run() -> None:
            model = make_model(name)
            enable_duo_attention(model, MIXED, SINK, RECENT)
            change(model)
            model(tokens, **given)

        return run

    def set_dropout(model: Any) -> None:
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1

    def set_bidirectional(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.is_causal = False

    def set_window(model: Any) -> None:
        model.config.sliding_window = 16

    def forget_table(model: Any) -> None:
        del model.model.layers[1].self_attn.duo_head_windows

    def ask_for_gradient() -> None:
        model = make_model()
        enable_duo_attention(model, MIXED, SINK, RECENT)
        with torch.enable_grad():
            model(tokens).logits.sum().backward()

    calls: dict[str, Callable[[], object]] = {
        "dropout": call(set_dropout),
        "bidirectional": call(set_bidirectional),
        "sliding window": call(set_window, "mistral"),
        "packed sequences": call(position_ids=torch.arange(200)[None] % 100, use_cache=False),
        "mask over queries and keys": call(attention_mask=causal),
        "additive mask": call(attention_mask=causal.float().log()),
        "mask longer than the keys": call(attention_mask=torch.zeros(2, 210, dtype=torch.long)),
        "softcap": call(softcap=30.0),
        "attention sinks": call(s_aux=torch.zeros(8)),
        "packed lengths": call(cu_seq_lens_q=torch.tensor([0, 200, 400])),
        "no table": call(forget_table),
        "gradient": ask_for_gradient,
    }
    assert_expected_inline(
        report(calls),
        """\
dropout -> ValueError: LlamaAttention: attention with dropout 0.1, expected 0: there is no backward
bidirectional -> ValueError: LlamaAttention: attention with is_causal False, expected causal attention
sliding window -> ValueError: DuoAttention: the model asks for a mask that is not causal alone (a sliding window, packed sequences, bidirectional tokens), expected a causal one. Without a cache and an attention_mask, transformers may ask for packed sequences: pass use_cache=True
packed sequences -> ValueError: DuoAttention: the model asks for a mask that is not causal alone (a sliding window, packed sequences, bidirectional tokens), expected a causal one. Without a cache and an attention_mask, transformers may ask for packed sequences: pass use_cache=True
mask over queries and keys -> ValueError: DuoAttention: attention_mask is a mask of its own over queries and keys, expected none or a mask [batch, keys] of the tokens that are no padding
additive mask -> ValueError: DuoAttention: attention_mask is a mask of its own over queries and keys, expected none or a mask [batch, keys] of the tokens that are no padding
mask longer than the keys -> ValueError: DuoAttention: attention_mask has shape [2, 210], expected [2, up to 200]: one number for each key
softcap -> ValueError: LlamaAttention: attention with softcap, expected none: it is not supported
attention sinks -> ValueError: LlamaAttention: attention with s_aux, expected none: it is not supported
packed lengths -> ValueError: LlamaAttention: attention with cu_seq_lens_q, expected none: it is not supported
no table -> ValueError: LlamaAttention: attention without a head table, expected a layer that enable_duo_attention found. Models that were built with one config share its attention: give each a copy.deepcopy of it
gradient -> NotImplementedError: attention: has no gradient, it is forward-only; run it under torch.no_grad() or torch.inference_mode(), or detach its inputs""",
    )
