"""benchmarks/measure_gpu.py without a GPU: its parts, what it needs, and how records of parts become one."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from benchmark_records import made_up_record, made_up_whole_model_record
from expecttest import assert_expected_inline

import measure_gpu
import readme_tables

ROOT = Path(__file__).parents[2]


def halves() -> tuple[dict[str, Any], dict[str, Any]]:
    """A record of whole models as two runs of some of its videos each would leave it."""
    whole = made_up_whole_model_record() | {"complete": True, "wall_seconds": 100.0}
    first, second = json.loads(json.dumps(whole)), json.loads(json.dumps(whole)) | {"date": "2030-01-02T09:00:00+00:00"}
    for part in ("steps", "overhead"):
        first[part], second[part] = whole[part][:1], whole[part][1:]
    return first, second


def write(record: dict[str, Any], folder: Path, name: str = "whole_model_h200") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record))


def test_every_gpu_table_of_the_readme_has_a_part() -> None:
    assert {part.name for part in measure_gpu.PARTS.values()} == set(readme_tables.GPU_TABLES)


def test_a_part_without_fa3_or_telemetry_is_no_part() -> None:
    for name, part in measure_gpu.PARTS.items():
        assert (ROOT / part.script).exists()
        assert name == "video_dit" or set(measure_gpu.PEERS) <= set(part.modules)


def test_each_command_of_the_help_fits_into_nine_minutes() -> None:
    told = [
        line.split("--only ")[1].split()[0] for line in (measure_gpu.__doc__ or "").splitlines() if "--only " in line
    ]
    assert {name for parts in told for name in parts.split(",")} == set(measure_gpu.PARTS)
    for parts in told:
        assert sum(measure_gpu.PARTS[name].seconds for name in parts.split(",")) < 400


@pytest.mark.parametrize("name", measure_gpu.PARTS)
def test_every_option_of_a_part_is_one_of_its_script(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    _, script, *options = measure_gpu.command_of(name, tmp_path)
    text = Path(script).read_text() + (ROOT / "benchmarks" / "run.py").read_text()
    for option in options:
        flag = option.partition("=")[0]
        assert f'"{flag}"' in text, f"{script} has no {flag}"
    assert name != "video_dit" or f"--record={tmp_path / 'video_dit_h100.json'}" in options


def test_rows_of_two_runs_become_one_record(tmp_path: Path) -> None:
    first, second = halves()
    write(first, tmp_path / "a")
    write(second, tmp_path / "b" / "below")
    results = tmp_path / "results"
    results.mkdir()
    assert measure_gpu.merge([tmp_path / "a", tmp_path / "b"], results) == [results / "whole_model_h200.json"]
    record = json.loads((results / "whole_model_h200.json").read_text())
    whole = made_up_whole_model_record()
    assert (record["steps"], record["overhead"], record["host"]) == (whole["steps"], whole["overhead"], whole["host"])
    assert record["modes"] == whole["modes"]
    assert (record["date"], record["wall_seconds"]) == ("2030-01-02T09:00:00+00:00", 200.0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kernel_hash": "0" * 12}, "kernel_hash is 'aaaabbbbcccc' in one part and '000000000000' in another"),
        ({"torch": "2.12.0"}, "torch is '2.11.0+cu130' in one part and '2.12.0' in another"),
        ({"complete": False}, "was cut short; measure it again"),
        ({"failures": [{"part": "steps", "error": "no"}]}, "holds failures: "),
    ],
)
def test_what_does_not_belong_together_or_is_not_whole_is_refused(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    first, second = halves()
    write(first, tmp_path / "a")
    write(second | change, tmp_path / "b")
    with pytest.raises(ValueError, match=re.escape(told)):
        measure_gpu.merge([tmp_path / "a", tmp_path / "b"], tmp_path)
    assert not [*tmp_path.glob("*.json")]


@pytest.mark.parametrize("record", [made_up_record(), halves()[0]], ids=["attention", "the same step"])
def test_what_was_measured_twice_is_refused(record: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(record, tmp_path / folder)
    with pytest.raises(ValueError, match="two records of the same"):
        measure_gpu.merge([tmp_path], tmp_path)


def test_merging_writes_records_plots_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        made.append(" ".join(Path(part).name for part in command[1:]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(measure_gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(measure_gpu.subprocess, "run", run)
    (tmp_path / "results").mkdir()
    write(made_up_record(), tmp_path / "some", "attention_h100")
    assert measure_gpu.main(["--merge", str(tmp_path / "some")]) == 0
    assert made == ["plots.py attention_h100.json", "readme_tables.py"]
    assert (tmp_path / "results" / "attention_h100.json").exists()


def test_what_is_missing_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    part = measure_gpu.PARTS["attention"]._replace(modules=("math", "no_such_wheel"))
    monkeypatch.setitem(measure_gpu.PARTS, "attention", part)
    with pytest.raises(SystemExit):
        measure_gpu.main(["--only", "attention", "--out", str(tmp_path)])
    assert_expected_inline(
        capsys.readouterr().err.splitlines()[-1].partition("error: ")[2],
        """cannot be imported: no_such_wheel (ModuleNotFoundError: No module named 'no_such_wheel')""",
    )
    assert not [*tmp_path.iterdir()]


def test_parts_run_one_after_another_until_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = shutil.which("sh")
    assert shell is not None
    lines = {"attention": "echo done", "sparse_families": "sleep 60"}
    monkeypatch.setattr(measure_gpu, "command_of", lambda part, folder: [shell, "-c", lines[part]])
    began = time.monotonic()
    assert measure_gpu.measure([*lines], tmp_path, began + 1) == 1
    assert time.monotonic() - began < 30
    assert (tmp_path / "measure_attention.log").read_text() == "[attention] done\n"
    assert measure_gpu.measure(["attention"], tmp_path, began + 60) == 0
