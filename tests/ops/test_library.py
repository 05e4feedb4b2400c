"""The compiled part: its loading errors, its report, and every build of the CPU kernel on this processor."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

import lite_attention
from lite_attention import info
from lite_attention.ops.interface import operator_interface
from lite_attention.ops.load import OPERATOR_INTERFACE, host

PACKAGE = Path(lite_attention.__file__).parent


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=300,
    )


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """A copy of the package's Python files, without what was compiled."""
    shutil.copytree(PACKAGE, tmp_path / "lite_attention", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path / "lite_attention"


def import_error(package: Path, before: str = "") -> str:
    """The text of the ImportError that importing `package` gives, paths and versions made stable."""
    # -S: site-packages by hand, so that no editable install finds its own copy first.
    code = f"""
import sys
sys.path[:0] = [{str(package.parent)!r}, {sysconfig.get_path("purelib")!r}, {sysconfig.get_path("platlib")!r}]
{before}
try:
    import lite_attention
except ImportError as error:
    print(error)
"""
    done = run_python(code, "-S")
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(package), "PACKAGE").replace(torch.__version__, "TORCH").strip()


@pytest.mark.slow
def test_import_without_the_compiled_part_lists_likely_causes(copied_package: Path) -> None:
    assert_expected_inline(
        import_error(copied_package),
        """\
lite_attention cannot start: its compiled part, lite_attention._host, is not there or does not load (No module named 'lite_attention._host')
Likely causes:
  * the package was not installed, only its folder is on the path
  * it was built for another Python version or processor
  * an editable install whose build failed or was deleted
Reinstall it from its source folder, in the environment you run: `pip install .`""",
    )


def copy_compiled_part(package: Path) -> None:
    for library in Path(host.__file__ or "").parent.glob("*.so"):
        shutil.copy(library, package)


@pytest.mark.slow
def test_a_changed_schema_without_a_new_build_says_so(copied_package: Path) -> None:
    copy_compiled_part(copied_package)
    assert import_error(copied_package) == ""
    operator = copied_package / "ops" / "top_k_map.py"
    operator.write_text(operator.read_text().replace("int count)", "int count, *, bool sorted=False)"))
    changed = operator_interface(copied_package / "ops")
    assert changed != OPERATOR_INTERFACE
    assert_expected_inline(
        import_error(copied_package).replace(changed, "NEW").replace(OPERATOR_INTERFACE, "OLD"),
        """\
lite_attention cannot start: its compiled part, lite_attention._host, was built for operator interface OLD, expected NEW, the hash of the schemas in lite_attention/ops
Likely causes:
  * the Python files were updated without rebuilding
  * two versions of lite_attention are installed
Reinstall it from its source folder, in the environment you run: `pip install .`""",
    )


@pytest.mark.slow
def test_an_operator_library_of_another_build_says_so(copied_package: Path) -> None:
    copy_compiled_part(copied_package)
    library = copied_package / "_ops.so"
    library.write_bytes(library.read_bytes().replace(OPERATOR_INTERFACE.encode(), 16 * b"0"))
    assert_expected_inline(
        import_error(copied_package).replace(OPERATOR_INTERFACE, "NEW"),
        """\
lite_attention cannot start: its operator library _ops.so was built for operator interface 0000000000000000, expected NEW, the hash of the schemas in lite_attention/ops
Likely causes:
  * the Python files were updated without rebuilding
  * two versions of lite_attention are installed
Reinstall it from its source folder, in the environment you run: `pip install .`""",
    )


@pytest.mark.slow
def test_a_library_of_other_kernels_says_so(copied_package: Path) -> None:
    copy_compiled_part(copied_package)
    library = copied_package / "_ops.so"
    library.write_bytes(library.read_bytes().replace(host.KERNEL_HASH.encode(), 12 * b"0"))
    assert_expected_inline(
        import_error(copied_package).replace(host.KERNEL_HASH, "HASH"),
        """\
lite_attention cannot start: its operator library _ops.so was built from the kernels 000000000000, expected HASH, those that lite_attention._host tells
Likely causes:
  * compiled files of two builds lie beside one another
Reinstall it from its source folder, in the environment you run: `pip install .`""",
    )


@pytest.mark.slow
def test_a_library_from_before_interfaces_were_told_says_so(copied_package: Path) -> None:
    copy_compiled_part(copied_package)
    library = copied_package / "_ops.so"
    symbol = b"lite_attention_operator_interface"
    library.write_bytes(library.read_bytes().replace(symbol, symbol[::-1]))
    assert "its operator library _ops.so was built for operator interface None, expected" in import_error(
        copied_package
    )


def test_the_interface_is_that_of_the_schemas_defined() -> None:
    schemas = [
        str(getattr(torch.ops.lite_attention, name).default._schema)
        for name in dir(torch.ops.lite_attention)
        if isinstance(getattr(torch.ops.lite_attention, name), torch._ops.OpOverloadPacket)
    ]
    assert len(schemas) >= 4
    text = "\n".join(sorted(schema.removeprefix("lite_attention::") for schema in schemas))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == OPERATOR_INTERFACE


def test_a_schema_that_is_computed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scan.py").write_text("\nSCHEMA = f'scan(Tensor {name}) -> Tensor'\n")
    with pytest.raises(ValueError, match=r"scan\.py: SCHEMA is computed, expected a literal"):
        operator_interface(tmp_path)


@pytest.mark.slow
def test_import_with_a_damaged_operator_library_says_so(copied_package: Path) -> None:
    (copied_package / "_host.py").write_text(
        f"OPERATOR_INTERFACE = {OPERATOR_INTERFACE!r}\nVERSION = '0'\nselected_cpu_variant = lambda: 'any'\n"
    )
    (copied_package / "_ops.so").write_bytes(b"\x7fELF")
    assert_expected_inline(
        import_error(copied_package),
        """\
lite_attention cannot start: its operator library _ops.so does not load (PACKAGE/_ops.so: file too short)
Likely causes:
  * torch TORCH lacks part of the stable interface the library was built for
  * the C++ runtime is older than the compiler that built the library
  * the file is missing or truncated
Reinstall it from its source folder, in the environment you run: `pip install .`""",
    )


@pytest.mark.slow
def test_import_with_a_damaged_cuda_library_says_so(copied_package: Path) -> None:
    (copied_package / "_host.py").write_text(
        f"OPERATOR_INTERFACE = {OPERATOR_INTERFACE!r}\nVERSION = '0'\nCUDA_ARCHITECTURES = '90a'\n"
        f"KERNEL_HASH = {host.KERNEL_HASH!r}\n"
        "selected_cpu_variant = lambda: 'any'\n"
    )
    shutil.copy(Path(host.__file__ or "").with_name("_ops.so"), copied_package)
    (copied_package / "_cuda_ops.so").write_bytes(b"\x7fELF")
    with_cuda = "import torch; torch.version.cuda = '13.0'"
    first_try = "try:\n    import lite_attention\nexcept ImportError:\n    pass"
    message = import_error(copied_package, before=with_cuda)
    assert_expected_inline(
        message,
        """\
lite_attention cannot start: its operator library _cuda_ops.so does not load (PACKAGE/_cuda_ops.so: file too short)
Likely causes:
  * torch TORCH lacks part of the stable interface the library was built for
  * the C++ runtime is older than the compiler that built the library
  * the file is missing or truncated
Reinstall it from its source folder, in the environment you run: `pip install .`""",
    )
    assert import_error(copied_package, before=f"{with_cuda}\n{first_try}") == message


@pytest.mark.slow
def test_import_under_an_old_torch_says_so(copied_package: Path) -> None:
    assert_expected_inline(
        import_error(copied_package, before="import torch; torch.__version__ = '2.9.1+cpu'"),
        """\
lite_attention cannot start: torch 2.9.1+cpu is installed, expected 2.10 or newer
Likely causes:
  * this environment was not upgraded: `pip install 'torch>=2.10'`
Reinstall it from its source folder, in the environment you run: `pip install .`""",
    )


@pytest.mark.slow
def test_info_command_prints_what_the_build_holds() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lite_attention.info", "--json"], capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert facts["lite_attention"] == lite_attention.__version__
    assert facts["torch"] == torch.__version__
    for row in facts["tiles"]:
        head_dim = row["head_dim up to"]
        assert lite_attention.tile_shape(head_dim, torch.bfloat16) == (row["tile_m"], row["tile_n"])
        assert lite_attention.visit_rows(head_dim, torch.bfloat16) == row["visit_rows"]
    backends = {backend["name"]: backend for backend in facts["backends"]}
    assert backends["cpu"]["available"]
    assert host.selected_cpu_variant() in backends["cpu"]["reason"]
    assert backends["sm90"]["reason"]


def test_info_text_names_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    facts = info.report()
    info._print_text(facts)
    text = capsys.readouterr().out
    for name, value in facts.items():
        if isinstance(value, str):
            assert name in text
            assert value in text
    for backend in facts["backends"]:
        assert backend["reason"] in text


VARIANT_CHECK = """
import torch
from lite_attention import reference, skip_attention, pack_keep_map
from lite_attention.ops.load import host
torch.manual_seed(0)
for head_dim in (40, 128, 256):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = torch.randn(2, 150, 4, head_dim).to(dtype)
        k, v = (torch.randn(2, 333, 2, head_dim).to(dtype) for _ in range(2))
        keep = pack_keep_map(torch.rand(2, 4, 3, 3 if head_dim <= 128 else 6) < 0.6)
        threshold = torch.linspace(-4.0, -0.5, 4)
        got = skip_attention(q, k, v, keep, threshold)
        want = reference.skip_attention(q, k, v, keep, None, None, threshold, head_dim**-0.5)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(got[0].double(), want[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(got[1].double(), want[1], atol=1e-5, rtol=1e-5)
        assert torch.equal(got[2], want[2])
print(host.selected_cpu_variant())
"""


@pytest.mark.slow
@pytest.mark.parametrize("variant", host.cpu_variants())
def test_every_cpu_variant_agrees_with_the_oracle(variant: str) -> None:
    done = run_python(VARIANT_CHECK, LITE_ATTENTION_CPU_VARIANT=variant)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == variant


@pytest.mark.slow
def test_unknown_cpu_variant_names_the_choices() -> None:
    done = run_python("import lite_attention", LITE_ATTENTION_CPU_VARIANT="mmx")
    assert done.returncode != 0
    expected = f"LITE_ATTENTION_CPU_VARIANT is 'mmx', expected one of: {' '.join(host.cpu_variants())}"
    assert f"ImportError: lite_attention cannot start: {expected}" in done.stderr


@pytest.mark.slow
def test_a_second_import_after_a_failure_tells_the_same_story(copied_package: Path) -> None:
    first = "try:\n    import lite_attention\nexcept ImportError:\n    pass"
    assert import_error(copied_package, before=first) == import_error(copied_package)


def test_the_facts_of_a_run_are_those_of_the_library_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "KERNEL_HASH", "0123456789ab")
    monkeypatch.setattr(host, "GIT_REVISION", "ba9876543210-dirty")
    facts = info.facts_of_run("python some.py", on_gpu=False)
    assert (facts["command"], facts["kernel_hash"]) == ("python some.py", "0123456789ab")
    assert facts["revision"] == facts["environment"]["revision"] == "ba9876543210-dirty"
    assert (facts["gpu"], facts["driver"], facts["torch"]) == (None, None, torch.__version__)
