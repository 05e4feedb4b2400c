"""Attention layers with FastVideo's calls: backends by name, one GPU or many, eager or compiled (docs/layers.md)."""

from lite_attention.layers.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    Backend,
    PlainMetadataBuilder,
)
from lite_attention.layers.backends import BUILTIN
from lite_attention.layers.distributed import DistributedAttention, DistributedAttention_VSA
from lite_attention.layers.forward_context import ForwardContext, get_forward_context, set_forward_context
from lite_attention.layers.layer import LocalAttention
from lite_attention.layers.registry import AttentionBackendEnum, add_builtin_backend, register_attention_backend
from lite_attention.layers.selector import (
    STR_BACKEND_ENV_VAR,
    backend_name_to_enum,
    get_attn_backend,
    get_env_variable_attn_backend,
    get_global_forced_attn_backend,
    global_force_attn_backend,
    global_force_attn_backend_context_manager,
)
from lite_attention.parallel.mesh import get_sequence_parallel_mesh, sequence_parallel_mesh, set_sequence_parallel_mesh

__all__ = [
    "STR_BACKEND_ENV_VAR",
    "AttentionBackend",
    "AttentionBackendEnum",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "Backend",
    "DistributedAttention",
    "DistributedAttention_VSA",
    "ForwardContext",
    "LocalAttention",
    "PlainMetadataBuilder",
    "backend_name_to_enum",
    "get_attn_backend",
    "get_env_variable_attn_backend",
    "get_forward_context",
    "get_global_forced_attn_backend",
    "get_sequence_parallel_mesh",
    "global_force_attn_backend",
    "global_force_attn_backend_context_manager",
    "register_attention_backend",
    "sequence_parallel_mesh",
    "set_forward_context",
    "set_sequence_parallel_mesh",
]

for _backend in BUILTIN:
    add_builtin_backend(_backend)
del _backend
