"""The fuzz of the GPU's kernels, on the CPU's: what it draws, that it passes, and that it notices what is left out."""

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lite_attention import attention, skip_attention, top_k_map
from support.fuzz_problems import OPERATORS, Problem, random_problem

SCRIPT = Path(__file__).parents[1] / "gpu" / "fuzz_sm90.py"
_spec = importlib.util.spec_from_file_location("fuzz_sm90", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
fuzz = importlib.util.module_from_spec(_spec)
sys.modules["fuzz_sm90"] = fuzz  # dataclasses look their module up
_spec.loader.exec_module(fuzz)

CPU = torch.device("cpu")
ARGUMENTS = ("tile_n", "kv_tile_lens", "causal", "head_windows")
SPOILT_INPUTS = ("NaN in q", "NaN in k")


def small_problems(argument: str, operator: str | None = None) -> Iterator[Problem]:
    """Those of the sequence that have it, of any or of one operator, and are quickly judged."""
    return (
        problem
        for problem in map(random_problem, itertools.repeat(0), range(10_000))
        if (argument in problem.arguments() or argument == problem.operator)
        and operator in (None, problem.operator)
        and problem.case.query_len * problem.case.kv_len * problem.case.heads * problem.case.batch < 300_000
        and problem.case.query_len > 100
        and problem.case.kv_len > 200
        and problem.keep != "no tile"
        and problem.kv_lens is None
    )


def small_problem(argument: str, operator: str | None = None) -> Problem:
    return next(small_problems(argument, operator))


def test_every_operator_and_argument_is_drawn() -> None:
    problems = [random_problem(0, number) for number in range(300)]
    assert {problem.operator for problem in problems} == set(OPERATORS)
    drawn = {name for problem in problems for name in problem.arguments()}
    assert drawn == {"must_keep", "kv_lens", *ARGUMENTS, *SPOILT_INPUTS}
    assert {problem.masks.causal for problem in problems} == {None, "top-left", "bottom-right"}


@pytest.mark.parametrize("name", [*ARGUMENTS, *SPOILT_INPUTS, *OPERATORS])
def test_kernels_pass(name: str) -> None:
    assert fuzz.judge(small_problem(name), CPU).wrong == []


@pytest.mark.parametrize("argument", ["kv_tile_lens", "causal", "head_windows"])
def test_an_argument_that_a_kernel_leaves_out_is_noticed(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*tensors: Any, **named: Any) -> Any:
        if argument == "causal":
            named["head_windows"] = None
        return attention(*tensors, **{**named, argument: None})

    monkeypatch.setattr(fuzz, "attention", without)
    wrong = fuzz.judge(small_problem(argument), CPU).wrong
    assert "out" in wrong
    assert "lse" in wrong


@pytest.mark.parametrize("name", SPOILT_INPUTS)
def test_kernels_that_skip_keep_what_is_nan(name: str) -> None:
    assert fuzz.judge(small_problem(name, "skip_attention"), CPU).wrong == []


@pytest.mark.parametrize("name", SPOILT_INPUTS)
def test_a_kernel_that_passes_over_nan_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(q: Tensor, k: Tensor, *others: Any, **named: Any) -> Any:
        return skip_attention(q.nan_to_num(), k.nan_to_num(), *others, **named)

    monkeypatch.setattr(fuzz, "skip_attention", without)
    few = itertools.islice(small_problems(name, "skip_attention"), 5)  # of one, no row may visit the tile
    wrong = {what for problem in few for what in fuzz.judge(problem, CPU).wrong}
    assert {"out", "lse"} <= wrong


def test_a_wrong_choice_of_the_largest_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "top_k_map", lambda scores, count: top_k_map(-scores, count))
    problem = small_problem("top_k_map")
    assert fuzz.judge(problem, CPU).wrong == ["top_k_map"]
