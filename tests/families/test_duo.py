"""DuoAttention's pattern files, and the reordering of weights."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from lite_attention.families.duo import (
    load_duo_pattern,
    reorder_weights_for_duo_attn,
    restore_weights_after_duo_attn,
    save_duo_pattern,
    sparsify_attention_heads,
)
from support.inputs import report
from support.language_models import HEADS, KV_HEADS, LAYERS, MAKERS, MIXED, WIDTH, make_model, make_tokens

every_model = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def reorder(model: nn.Module, heads: Any = MIXED, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "sink_size": 4,
        "recent_size": 31,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_size": WIDTH,
    }
    return reorder_weights_for_duo_attn(model, heads, **given | changes)


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


# Reordering


@every_model
def test_a_reordered_model_computes_what_it_did(name: str) -> None:
    model = make_model(name)
    tokens = make_tokens(length=50)
    expected = model(tokens).logits
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    reorder(model)
    assert any(not torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)


@every_model
def test_restoring_gives_every_weight_back_bit_for_bit(name: str) -> None:
    model = make_model(name)
    before = copy.deepcopy(model.state_dict())
    for heads in (MIXED, torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]])):
        reorder(model, heads)
        assert model.state_dict().keys() == before.keys(), "nothing is added to what is saved"
        restore_weights_after_duo_attn(model)
        assert_same_weights(model, before)


def test_full_heads_come_first_and_keep_their_order() -> None:
    model = make_model("qwen3")
    before = copy.deepcopy(model.state_dict())
    reorder(model, [[0, 1, 0, 1], [1, 1, 1, 1]])
    after = model.state_dict()
    head_dim, group = 16, HEADS // KV_HEADS
    for letter, heads_of_each in (("q", group), ("k", 1), ("v", 1)):
        old = before[f"model.layers.0.self_attn.{letter}_proj.weight"].split(heads_of_each * head_dim)
        expected = torch.cat([old[head] for head in (1, 3, 0, 2)])
        assert torch.equal(after[f"model.layers.0.self_attn.{letter}_proj.weight"], expected)
    old = before["model.layers.0.self_attn.o_proj.weight"].split(group * head_dim, 1)
    expected = torch.cat([old[head] for head in (1, 3, 0, 2)], 1)
    assert torch.equal(after["model.layers.0.self_attn.o_proj.weight"], expected)
    for key, weight in before.items():
        if "layers.0.self_attn" not in key or "norm" in key:
            assert torch.equal(after[key], weight), key


def test_the_result_is_the_seeds() -> None:
    assert reorder(make_model(), [[0, 1, 0, 1], [0, 0, 0, 0]], sink_size=128, recent_size=256) == {
        "retrieval_idx": [slice(0, 4), slice(0, 0)],
        "streaming_idx": [slice(4, 8), slice(0, 8)],
        "sink_size": 128,
        "recent_size": 256,
        "enable_duo_attention": True,
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_stay_where_and_what_they_are(dtype: torch.dtype, device: str) -> None:
    model = make_model("qwen2").to(device, dtype)
    before = copy.deepcopy(model.state_dict())
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    reorder(model, [torch.tensor(row).numpy() for row in MIXED], device=device)
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr(), parameter.dtype) == (places[name], dtype)
        assert parameter.requires_grad
    model.to("cpu")
    restore_weights_after_duo_attn(model)
    assert_same_weights(model, {name: weight.cpu() for name, weight in before.items()})


def test_a_copy_of_a_reordered_model_knows_that_it_is_one() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    reorder(model)
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="reordered already"):
        reorder(twin)
    restore_weights_after_duo_attn(twin)
    assert_same_weights(twin, before)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    model.model.layers[-1].self_attn.sinks = nn.Parameter(torch.zeros(HEADS))
    with pytest.raises(ValueError, match="parameter sinks"):
        reorder(model)
    del model.model.layers[-1].self_attn.sinks
    assert_same_weights(model, before)
    reorder(model)


def test_errors_of_reordering() -> None:
    def changed(change: Callable[[Any], object], name: str = "llama", **given: Any) -> Callable[[], object]:
        def call() -> None:
            model = make_model(name)
            change(model.model.layers[1].self_attn)
            reorder(model, **given)

        return call

    def quantise(attention: Any) -> None:
        attention.v_proj.weight = nn.Parameter(attention.v_proj.weight.to(torch.int8), requires_grad=False)

    def remove_output(attention: Any) -> None:
        del attention.o_proj

    def widen_norm(attention: Any) -> None:
        attention.q_norm.weight = nn.Parameter(torch.ones(24))

    def offload(attention: Any) -> None:
        attention.to("meta")

    calls: dict[str, Callable[[], object]] = {
        "one layer": lambda: reorder(make_model(), MIXED[:1]),
        "too few heads": lambda: reorder(make_model(), ([0, 1, 0, 1], [0, 1])),
        "one a query head": lambda: reorder(make_model(), torch.ones(LAYERS, HEADS)),
        "one row for all layers": lambda: reorder(make_model(), torch.ones(KV_HEADS)),
        "no table": lambda: reorder(make_model(), 0.25),
        "gates": lambda: reorder(make_model(), torch.full((LAYERS, KV_HEADS), 0.5)),
        "heads that do not divide": lambda: reorder(make_model(), num_attention_heads=6),
        "twice as many heads": lambda: reorder(
            make_model(), [[0, 1] * 4] * LAYERS, num_attention_heads=2 * HEADS, num_key_value_heads=2 * KV_HEADS
        ),
        "another width": lambda: reorder(make_model(), hidden_size=128),
        "another device": lambda: reorder(make_model(), device="cuda"),
        "no decoder": lambda: reorder(nn.Linear(3, 3)),
        "no attention": lambda: reorder(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)])})),
        "quantised": changed(quantise),
        "offloaded": changed(offload),
        "no output projection": changed(remove_output),
        "a norm of odd width": changed(widen_norm, "qwen3"),
        "not reordered": lambda: restore_weights_after_duo_attn(make_model()),
    }
    assert_expected_inline(
        report(calls),
        """\
one layer -> ValueError: reorder_weights_for_duo_attn: full_attention_heads has 1 rows, expected 2, one a layer
too few heads -> ValueError: reorder_weights_for_duo_attn: full_attention_heads[1] has 2 heads, expected 4, one a KV head
one a query head -> ValueError: reorder_weights_for_duo_attn: full_attention_heads[0] has 8 heads, expected 4, one a KV head
one row for all layers -> TypeError: reorder_weights_for_duo_attn: full_attention_heads has 1.0 in place of a list, expected a row of 0 and 1 a layer
no table -> TypeError: reorder_weights_for_duo_attn: full_attention_heads has 0.25 in place of a list, expected a row of 0 and 1 a layer
gates -> ValueError: reorder_weights_for_duo_attn: full_attention_heads[0][0] is 0.5, expected 0 or 1; sparsify_attention_heads makes such a table
heads that do not divide -> ValueError: reorder_weights_for_duo_attn: num_attention_heads is 6, expected a multiple of num_key_value_heads, 4
twice as many heads -> ValueError: reorder_weights_for_duo_attn: layers.0.self_attn.q_proj.weight has shape [64, 64], expected [128, 64] for 16 query heads, 8 KV heads, head_dim 8 and hidden_size 64
another width -> ValueError: reorder_weights_for_duo_attn: layers.0.self_attn.q_proj.weight has shape [64, 64], expected [64, 128] for 8 query heads, 4 KV heads, head_dim 8 and hidden_size 128
another device -> ValueError: reorder_weights_for_duo_attn: layers.0.self_attn.q_proj.weight is on cpu, expected cuda, the device given
no decoder -> TypeError: reorder_weights_for_duo_attn: Linear has no layers, expected model.layers or model.model.layers
no attention -> TypeError: reorder_weights_for_duo_attn: layers.0 of ModuleDict has no self_attn, expected one
quantised -> TypeError: reorder_weights_for_duo_attn: layers.1.self_attn.v_proj.weight is a Parameter of torch.int8 on cpu, expected a plain floating-point parameter: reorder before weights are quantised, sharded or offloaded
offloaded -> TypeError: reorder_weights_for_duo_attn: layers.1.self_attn.q_proj.weight is a Parameter of torch.float32 on meta, expected a plain floating-point parameter: reorder before weights are quantised, sharded or offloaded
no output projection -> ValueError: reorder_weights_for_duo_attn: layers.1.self_attn has no o_proj, expected q_proj, k_proj and v_proj, or qkv_proj, and o_proj
a norm of odd width -> ValueError: reorder_weights_for_duo_attn: layers.1.self_attn.q_norm.weight has shape [24], expected [128] for 8 query heads, 4 KV heads, head_dim 16 and hidden_size 64
not reordered -> RuntimeError: restore_weights_after_duo_attn: the weights of layers.0.self_attn are not reordered, expected reorder_weights_for_duo_attn before""",
    )


# Pattern files


def test_a_published_pattern_is_read(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text(
        "6.054687500000000000e-01\t0.000000000000000000e+00\t1.250000000000000000e+00\n"
        "-1.000000000000000000e-03\t4.310607910156250000e-04\t1.000000000000000000e+00\n"
    )
    (tmp_path / "config.json").write_text(
        '{"lr": 0.02, "sink_size": 128, "recent_size": 256, "deploy_sink_size": null}'
    )
    heads, sink_size, recent_size = load_duo_pattern(tmp_path)
    assert (sink_size, recent_size) == (128, 256)
    assert heads.tolist() == [[0.60546875, 0.0, 1.0], [0.0, 0.000431060791015625, 1.0]]
    assert heads.dtype == torch.float32


@pytest.mark.parametrize("shape", [(32, 8), (1, 5), (3, 1)])
def test_what_is_saved_is_read_back(tmp_path: Path, shape: tuple[int, int]) -> None:
    heads = torch.rand(shape)
    save_duo_pattern(tmp_path / "new" / "folder", heads, 64, 256)
    read = load_duo_pattern(str(tmp_path / "new" / "folder"))
    assert torch.equal(read.full_attention_heads, heads)
    assert read[1:] == (64, 256)
    full = sparsify_attention_heads(heads, sparsity=0.5)
    save_duo_pattern(tmp_path, full, 64, 256)
    assert torch.equal(load_duo_pattern(tmp_path).full_attention_heads.bool(), full)


def test_a_threshold_keeps_the_heads_at_it_and_above() -> None:
    gates = torch.tensor([[0.2, 0.5], [0.75, 0.4]])
    assert sparsify_attention_heads(gates, threshold=0.5).tolist() == [[False, True], [True, False]]
    assert sparsify_attention_heads(gates, threshold=0.0).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
def test_a_sparsity_streams_that_share_of_the_smallest_gates(sparsity: float) -> None:
    gates = torch.rand(10, 4)
    full = sparsify_attention_heads(gates, sparsity=sparsity)
    assert int((~full).sum()) == round(40 * sparsity)
    if 0 < sparsity < 1:
        assert gates[full].min() >= gates[~full].max()


def test_of_equal_gates_the_earlier_stays_full() -> None:
    gates = torch.tensor([[0.5, 1.0, 0.5], [0.5, 0.0, 0.5]])
    for sparsity, full in (
        (1 / 6, [[1, 1, 1], [1, 0, 1]]),
        (2 / 6, [[1, 1, 1], [1, 0, 0]]),
        (3 / 6, [[1, 1, 1], [0, 0, 0]]),
        (4 / 6, [[1, 1, 0], [0, 0, 0]]),
        (5 / 6, [[0, 1, 0], [0, 0, 0]]),
    ):
        assert sparsify_attention_heads(gates, sparsity=sparsity).int().tolist() == full


def test_errors_of_pattern_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def load(gates: str | None, config: Any = None) -> Callable[[], object]:
        def call() -> None:
            for file in Path("pattern").glob("*"):
                file.unlink()
            Path("pattern").mkdir(exist_ok=True)
            if gates is not None:
                Path("pattern/full_attention_heads.tsv").write_text(gates)
            if config is not None:
                Path("pattern/config.json").write_text(json.dumps(config))
            load_duo_pattern("pattern")

        return call

    sizes = {"sink_size": 4, "recent_size": 31}
    heads = torch.rand(2, 2)
    calls: dict[str, Callable[[], object]] = {
        "no folder": lambda: load_duo_pattern("nowhere"),
        "no gates": load(None, sizes),
        "no config": load("1\t0\n"),
        "empty": load("\n", sizes),
        "ragged": load("1\t0\n1\n", sizes),
        "spaces": load("1 0\n", sizes),
        "words": load("1\t0\n1\tfull\n", sizes),
        "NaN": load("1\tnan\n", sizes),
        "no sink_size": load("1\t0\n", {"recent_size": 3}),
        "recent_size null": load("1\t0\n", {"sink_size": 3, "recent_size": None}),
        "config is a list": load("1\t0\n", [1, 2]),
        "saving a row": lambda: save_duo_pattern("pattern", heads[0], 4, 31),
        "threshold and sparsity": lambda: sparsify_attention_heads(heads, threshold=0.5, sparsity=0.5),
        "neither": lambda: sparsify_attention_heads(heads),
        "sparsity in percent": lambda: sparsify_attention_heads(heads, sparsity=50),
    }
    assert_expected_inline(
        report(calls),
        """\
no folder -> FileNotFoundError: load_duo_pattern: nowhere/full_attention_heads.tsv is missing, expected full_attention_heads.tsv and config.json
no gates -> FileNotFoundError: load_duo_pattern: pattern/full_attention_heads.tsv is missing, expected full_attention_heads.tsv and config.json
no config -> FileNotFoundError: load_duo_pattern: pattern/config.json is missing, expected full_attention_heads.tsv and config.json
empty -> ValueError: load_duo_pattern: pattern/full_attention_heads.tsv is empty, expected a line for each layer
ragged -> ValueError: load_duo_pattern: pattern/full_attention_heads.tsv, line 2 has 1 heads, expected 2 as in the first line
spaces -> ValueError: load_duo_pattern: pattern/full_attention_heads.tsv, line 1 is '1 0', expected numbers with tabs between them
words -> ValueError: load_duo_pattern: pattern/full_attention_heads.tsv, line 2 is '1\\tfull', expected numbers with tabs between them
NaN -> ValueError: load_duo_pattern: pattern/full_attention_heads.tsv, line 1 is '1\\tnan', expected finite numbers
no sink_size -> ValueError: load_duo_pattern: pattern/config.json has sink_size None, expected a number of tokens
recent_size null -> ValueError: load_duo_pattern: pattern/config.json has recent_size None, expected a number of tokens
config is a list -> ValueError: load_duo_pattern: pattern/config.json has sink_size None, expected a number of tokens
saving a row -> ValueError: save_duo_pattern: full_attention_heads has 1 dimensions, expected 2: [layers, KV heads]
threshold and sparsity -> ValueError: sparsify_attention_heads: threshold is 0.5 and sparsity is 0.5, expected one of the two
neither -> ValueError: sparsify_attention_heads: threshold is None and sparsity is None, expected one of the two
sparsity in percent -> ValueError: sparsify_attention_heads: sparsity is 50, expected 0 to 1""",
    )
