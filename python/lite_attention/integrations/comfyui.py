"""LiteAttention in ComfyUI: a node that patches a video model. ComfyUI itself is not imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lite_attention.integrations._comfyui_override import MIN_TOKENS, LiteAttentionOverride
from lite_attention.skipping.arguments import Threshold
from lite_attention.skipping.policy import SkipPolicy

__all__ = [
    "NODE_CLASS_MAPPINGS",
    "NODE_DISPLAY_NAME_MAPPINGS",
    "LiteAttentionNode",
    "LiteAttentionOverride",
    "ModelPatcher",
    "patch_model",
]

# The wrapper types that run around a whole model call, an evaluation of the model by the sampler and a whole sampling,
# of comfy.patcher_extension.WrappersMP.
APPLY_MODEL = "apply_model"
PREDICT_NOISE = "predict_noise"
OUTER_SAMPLE = "outer_sample"
WRAPPER_KEY = "lite_attention"
OVERRIDE_KEY = "optimized_attention_override"


class ModelPatcher(Protocol):
    """What is used of ComfyUI's ``comfy.model_patcher.ModelPatcher``."""

    model_options: dict[str, Any]

    def clone(self) -> ModelPatcher:
        """A patcher of the same model whose options can be changed apart."""

    def get_model_object(self, name: str) -> Any:
        """An attribute of the model, such as ``diffusion_model``."""

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None:
        """Run ``wrapper(executor, *args, **kwargs)`` in place of ``executor(*args, **kwargs)``."""

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None:
        """Take out the wrappers that were added under ``key``."""

    def set_model_patch_replace(self, patch: Callable[..., Any], name: str, block_name: str, number: int) -> None:
        """Run ``patch(args, {"original_block": block})`` in place of ``block(args)``."""


def patch_model(
    model: ModelPatcher,
    threshold: Threshold | None = None,
    dense_steps: int | None = None,
    min_tokens: int = MIN_TOKENS,
    *,
    policy: SkipPolicy | None = None,
    fixed_order: bool = False,
) -> ModelPatcher:
    """A clone of ``model`` with LiteAttention in its video self-attention; ``model`` stays as it is.

    An override that is there already keeps all other calls. LiteAttention that is there already is replaced.

    Args:
        model: ComfyUI's patcher of a video model.
        threshold, dense_steps, min_tokens, policy, fixed_order: as for :class:`LiteAttentionOverride`.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """
    if not callable(getattr(model, "clone", None)):
        raise TypeError(f"patch_model: model has type {type(model).__name__}, expected ComfyUI's ModelPatcher")
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    previous = options.get(OVERRIDE_KEY)
    if isinstance(previous, LiteAttentionOverride):
        previous = previous.previous
    override = LiteAttentionOverride(
        threshold, dense_steps, min_tokens, previous, policy=policy, fixed_order=fixed_order
    )
    options[OVERRIDE_KEY] = override
    wrappers = {
        APPLY_MODEL: override.around_model_call,
        PREDICT_NOISE: override.around_evaluation,
        OUTER_SAMPLE: override.around_sampling,
    }
    for wrapper_type, wrapper in wrappers.items():
        patched.remove_wrappers_with_key(wrapper_type, WRAPPER_KEY)
        patched.add_wrapper_with_key(wrapper_type, WRAPPER_KEY, wrapper)
    _name_blocks(patched)
    return patched


class LiteAttentionNode:
    """The node: a video model in, the model with LiteAttention out."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches"
    DESCRIPTION = "Skips, in the self-attention of video models, the tiles that earlier steps found not to matter."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """The node's inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "model": ("MODEL",),
                "threshold": (
                    "FLOAT",
                    {
                        "default": -10.0,
                        "min": -40.0,
                        "max": 0.0,
                        "step": 0.5,
                        "tooltip": "Powers of two. At -10, what is below a thousandth of a row's best score is "
                        "skipped. Closer to 0 is faster and less faithful.",
                    },
                ),
                "dense_steps": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 1000,
                        "tooltip": "Steps at the start that compute everything. The first always does.",
                    },
                ),
            },
            # Workflows saved before this input was there have none.
            "optional": {
                "fixed_order": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Say so only if the tiles of a latent come in the same order in each step. "
                        "Otherwise a model that is called tile by tile computes everything.",
                    },
                ),
            },
        }

    def patch(
        self, model: ModelPatcher, threshold: float, dense_steps: int, fixed_order: bool = False
    ) -> tuple[ModelPatcher]:
        """What ComfyUI runs."""
        return (patch_model(model, threshold, dense_steps, fixed_order=fixed_order),)


NODE_CLASS_MAPPINGS = {"LiteAttention": LiteAttentionNode}
NODE_DISPLAY_NAME_MAPPINGS = {"LiteAttention": "Lite Attention"}


def _name_blocks(patched: ModelPatcher) -> None:
    """Give the blocks of LTX-Video the names that other models give theirs.

    ComfyUI's LTX-Video does not say ``block_index``, but lets each block be replaced by number.
    """
    diffusion_model = patched.get_model_object("diffusion_model")
    if all(base.__name__ != "LTXVModel" for base in type(diffusion_model).__mro__):
        return
    replacements = patched.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
    for index in range(len(diffusion_model.transformer_blocks)):
        named = _NamedBlock(index, replacements.get(("double_block", index)))
        patched.set_model_patch_replace(named, "dit", "double_block", index)


class _NamedBlock:
    """Runs a block, or what replaces it, with its index in ``transformer_options``."""

    def __init__(self, index: int, replacement: Callable[..., Any] | None) -> None:
        self.index = index
        self.replacement = replacement

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        options = {**args["transformer_options"], "block_type": "double", "block_index": self.index}
        args = {**args, "transformer_options": options}
        return extra["original_block"](args) if self.replacement is None else self.replacement(args, extra)
