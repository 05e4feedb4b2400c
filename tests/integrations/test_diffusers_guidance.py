"""Which pipelines the diffusers door knows to name their guidance branches, and what it is told of the others."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import WanPipeline, WanVideoToVideoPipeline
from expecttest import assert_expected_inline
from torch import nn

from lite_attention.integrations.diffusers import enable_lite_attention, guidance, models
from support.inputs import report
from support.video_models import CASES, make_latents, make_transformer, run
from support.video_pipelines import wan

TRANSFORMERS = ("transformer", "transformer_2")


def pipelines_in_the_sources() -> Iterator[tuple[str, bool]]:
    """Every pipeline of the installed diffusers around a transformer that the door knows: does it name its branches?"""
    for file in sorted(Path(diffusers.__file__).parent.joinpath("pipelines").rglob("*.py")):
        source = file.read_text()
        if not any(name in source for name in models._VIDEO_MODELS):
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and takes_a_known_transformer(node):
                calls = {method.name: list(calls_of_a_transformer(method)) for method in methods_of(node)}
                named = calls.pop("__call__", [])
                yield node.name, len(named) > 0 and all(named) and not any(calls.values())


def methods_of(pipeline: ast.ClassDef) -> list[ast.FunctionDef]:
    return [node for node in pipeline.body if isinstance(node, ast.FunctionDef)]


def takes_a_known_transformer(pipeline: ast.ClassDef) -> bool:
    parts = [part for method in methods_of(pipeline) if method.name == "__init__" for part in method.args.args]
    types = [ast.unparse(part.annotation) for part in parts if part.arg in TRANSFORMERS and part.annotation]
    return any(name in text for text in types for name in models._VIDEO_MODELS)


def calls_of_a_transformer(method: ast.FunctionDef) -> Iterator[bool]:
    """For each call of a transformer in the method: whether it stands inside a ``with ...cache_context(...)``."""
    callees = {f"self.{name}" for name in TRANSFORMERS}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and ast.unparse(node.value) in callees:
            callees |= {ast.unparse(target) for target in node.targets}

    def visit(node: ast.AST, named: bool) -> Iterator[bool]:
        if isinstance(node, ast.With):
            named = named or any(".cache_context(" in ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in callees:
            yield named
        for child in ast.iter_child_nodes(node):
            yield from visit(child, named)

    return visit(method, False)


def test_the_table_is_what_the_sources_of_diffusers_say() -> None:
    found = dict(pipelines_in_the_sources())
    assert found["WanPipeline"]
    assert not found["WanVideoToVideoPipeline"]
    table = guidance._NAMING_PIPELINES
    naming = {name for name, names in found.items() if names}
    assert naming - table == set(), f"diffusers {diffusers.__version__}: these name their branches; add to guidance.py"
    stopped = (set(found) - naming) & table
    assert stopped == set(), f"diffusers {diffusers.__version__}: these no longer name their branches (guidance.py)"


class Loop:
    """A pipeline of the user's own: one call a step, with both branches in one batch."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer

    def __call__(self) -> None:
        for step, timestep in enumerate((900.0, 600.0, 300.0)):
            run(self.transformer, CASES["wan"], make_latents(CASES["wan"], step, batch=2), timestep)


def test_the_word_of_the_caller_is_taken_for_other_pipelines() -> None:
    pipeline = Loop(make_transformer(CASES["wan"]))
    handle = enable_lite_attention(pipeline, threshold=-2.0, guidance="batched")
    with torch.no_grad():
        pipeline()
    assert (handle.skip_fraction()[:, 1:] > 0.05).all()
    handle.disable()
    enable_lite_attention(pipeline, guidance="named")


def test_a_subclass_is_known_by_whose_call_it_runs() -> None:
    pipeline = wan()
    pipeline.__class__ = type("TunedPipeline", (WanPipeline,), {})
    enable_lite_attention(pipeline).disable()
    pipeline.__class__ = type("LoopingPipeline", (WanPipeline,), {"__call__": Loop.__call__})
    with pytest.raises(ValueError, match="LoopingPipeline, which is not known to name its guidance branches"):
        enable_lite_attention(pipeline)
    pipeline.__class__ = type("WanPipeline", (WanPipeline,), {"__call__": Loop.__call__})
    with pytest.raises(ValueError, match="WanPipeline, which is not known to name its guidance branches"):
        enable_lite_attention(pipeline)


def test_errors() -> None:
    parts = {name: part for name, part in wan().components.items() if name != "transformer_2"}
    transformer = make_transformer(CASES["wan"])
    nameless = Loop(nn.Linear(2, 2))
    pipeline: Any = WanVideoToVideoPipeline(**parts)
    calls: dict[str, Callable[[], object]] = {
        "branches without names": lambda: enable_lite_attention(pipeline),
        "a loop of one's own": lambda: enable_lite_attention(Loop(transformer)),
        "an unknown word": lambda: enable_lite_attention(pipeline, guidance="none"),  # type: ignore[arg-type]
        "a word that is no text": lambda: enable_lite_attention(pipeline, guidance=["named"]),  # type: ignore[arg-type]
        "of a transformer": lambda: enable_lite_attention(transformer, guidance="batched"),
        "nowhere to name them": lambda: enable_lite_attention(nameless, guidance="named"),
    }
    assert_expected_inline(
        report(calls),
        """\
branches without names -> ValueError: enable_lite_attention: guidance is None for a WanVideoToVideoPipeline, which is not known to name its guidance branches, expected 'named' if it calls each branch in the transformer's cache_context, or 'batched' if it calls the transformer once a step, with all branches in one batch or without guidance
a loop of one's own -> ValueError: enable_lite_attention: guidance is None for a Loop, which is not known to name its guidance branches, expected 'named' if it calls each branch in the transformer's cache_context, or 'batched' if it calls the transformer once a step, with all branches in one batch or without guidance
an unknown word -> ValueError: enable_lite_attention: guidance is 'none', expected 'named', 'batched' or None
a word that is no text -> ValueError: enable_lite_attention: guidance is ['named'], expected 'named', 'batched' or None
of a transformer -> ValueError: enable_lite_attention: guidance is 'batched' for a transformer, expected None: it tells how a pipeline calls its transformer
nowhere to name them -> ValueError: enable_lite_attention: guidance is 'named', expected 'batched': Linear has no cache_context in which branches could be named""",
    )
    assert not any(hasattr(module, "generation") for module in pipeline.transformer.modules()), "all or nothing"
