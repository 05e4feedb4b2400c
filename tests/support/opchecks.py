"""torch.library.opcheck with every check that an operator must pass, and inputs of unusual strides for it."""

from torch import Tensor
from torch.library import opcheck

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


def check(operator: object, *arguments: object) -> None:
    results = opcheck(operator, arguments, test_utils=CHECKS)
    assert results == dict.fromkeys(CHECKS, "SUCCESS")


def strided(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
