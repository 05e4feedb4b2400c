"""Every tensor that the package makes says of what dtype it is: torch's default is the user's to choose."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "python" / "lite_attention"
# torch.arange is not among them: of whole numbers, which is all that the package counts with, it is int64.
MAKERS = {
    "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "scalar_tensor", "tensor",
    "zeros",
}  # fmt: skip


def without_dtype(source: str) -> list[int]:
    """Lines of a file that make a tensor of the default dtype, or of whatever the values suggest."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in MAKERS
        and ast.unparse(node.func.value) == "torch"
        and "dtype" not in {keyword.arg for keyword in node.keywords}
    ]


def test_a_maker_without_dtype_is_found() -> None:
    source = "torch.zeros(3)\ntorch.zeros(3, dtype=torch.int8)\nx.new_zeros(3)\ntorch.full(\n    (2,), 1.0\n)\n"
    assert without_dtype(source) == [1, 4]


def test_every_tensor_of_the_package_names_its_dtype() -> None:
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lines := without_dtype(path.read_text()))
    }
    assert found == {}
