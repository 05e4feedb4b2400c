"""Guidance branches: which pipelines name theirs, and a number for each name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, get_args

from torch import nn

from lite_attention.skipping.branches import MAX_BRANCHES, skip_branch

__all__ = ["BranchNames", "Guidance", "check_guidance", "in_branch"]

Guidance = Literal["named", "batched"]

# The pipelines of diffusers whose __call__ makes every call of a transformer that `models` knows inside the
# transformer's cache_context, one name for each branch. Read in the sources of 0.36 to 0.42, where each of them does so
# in every version that has it; HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoImageToVideoPipeline, LTX2DFRPipeline,
# LTX2DFRTemporalRefinePipeline and WanVideoToVideoPipeline never do.
_NAMING_PIPELINES = frozenset(
    {
        "CogVideoXFunControlPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXPipeline",
        "CogVideoXVideoToVideoPipeline",
        "HunyuanVideoPipeline",
        "LTX2ConditionPipeline",
        "LTX2HDRPipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2InContextPipeline",
        "LTX2Pipeline",
        "LTXConditionPipeline",
        "LTXI2VLongMultiPromptPipeline",
        "LTXImageToVideoPipeline",
        "LTXPipeline",
        "LucyEditPipeline",
        "WanImageToVideoPipeline",
        "WanPipeline",
        "WanVACEPipeline",
    }
)


def check_guidance(model: object, transformers: Collection[nn.Module], guidance: Guidance | None) -> None:
    """Refuse pipelines whose branches would share a map because nothing says which is which."""
    if guidance is not None and guidance not in get_args(Guidance):
        raise ValueError(f"enable_lite_attention: guidance is {guidance!r}, expected 'named', 'batched' or None")
    if isinstance(model, nn.Module):
        if guidance is not None:
            raise ValueError(
                f"enable_lite_attention: guidance is {guidance!r} for a transformer, expected None: it tells how a "
                "pipeline calls its transformer"
            )
        return
    if guidance == "named":
        for transformer in transformers:
            if not hasattr(transformer, "cache_context"):
                raise ValueError(
                    "enable_lite_attention: guidance is 'named', expected 'batched': "
                    f"{type(transformer).__name__} has no cache_context in which branches could be named"
                )
    if guidance is None and not _names_branches(type(model)):
        raise ValueError(
            f"enable_lite_attention: guidance is None for a {type(model).__name__}, which is not known to name its "
            "guidance branches, expected 'named' if it calls each branch in the transformer's cache_context, or "
            "'batched' if it calls the transformer once a step, with all branches in one batch or without guidance"
        )


def _names_branches(pipeline_class: type) -> bool:
    caller = next(base for base in pipeline_class.__mro__ if "__call__" in vars(base) or base is object)
    return caller.__module__.partition(".")[0] == "diffusers" and caller.__name__ in _NAMING_PIPELINES


class BranchNames:
    """Numbers of the guidance branches that a pipeline names."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """The branch's number, given to it where it has none yet; RuntimeError where none is left."""
        if name not in self._numbers:
            if len(self._numbers) == MAX_BRANCHES:
                raise RuntimeError(
                    f"cache_context({name!r}): one guidance branch too many, expected at most {MAX_BRANCHES}: "
                    f"{', '.join(self._numbers)}"
                )
            self._numbers[name] = len(self._numbers)
        return self._numbers[name]

    def known_number(self, name: str) -> int:
        """The number of a branch that has run; ValueError where none of that name has."""
        if name not in self._numbers:
            known = ", ".join(map(repr, self._numbers)) or "none so far"
            raise ValueError(f"branch is {name!r}, expected a name that cache_context was given: {known}")
        return self._numbers[name]


@contextmanager
def in_branch(
    cache_context: Callable[..., AbstractContextManager[None]],
    branches: BranchNames,
    keep_ticking: Callable[[], None],
    name: str,
    **kwargs: object,
) -> Iterator[None]:
    """A transformer's cache_context, in which pipelines call each guidance branch: it chooses the skip state too."""
    keep_ticking()
    with skip_branch(branches.number(name)), cache_context(name, **kwargs):
        yield
