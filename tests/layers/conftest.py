"""What the tests of the layers share: no backend is asked for or registered, and none is left so."""

from collections.abc import Iterator

import pytest

from lite_attention.layers import AttentionBackendEnum, get_global_forced_attn_backend, registry
from lite_attention.layers.selector import STR_BACKEND_ENV_VAR


@pytest.fixture(autouse=True)
def _nothing_asked_for_or_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(STR_BACKEND_ENV_VAR, raising=False)
    ours = {name: backend for name, backend in registry._backends.items() if name in AttentionBackendEnum.__members__}
    monkeypatch.setattr(registry, "_backends", ours)
    yield
    assert get_global_forced_attn_backend() is None
