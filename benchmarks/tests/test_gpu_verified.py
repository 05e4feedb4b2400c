"""The committed record is of a run on a GPU of the Hopper kernels of these sources."""

import json
import warnings

from gpu_verified import RECORD, objection
from provenance import kernel_hash


def test_the_kernels_of_these_sources_ran_on_a_gpu_and_nothing_failed() -> None:
    """A run that was cut short counts for what it did; what it is not, verified, is warned of and in the record."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else None
    why = objection(record, kernel_hash())
    assert record is not None, why
    assert record["kernel_hash"] == kernel_hash(), why
    parts = [record[name] for name in ("suite", "fuzz", "sanitize") if name in record]
    assert not record["failed"], why
    assert sum(part.get("failed_tests", 0) + part.get("failed_cases", 0) for part in parts) == 0, why
    if why is not None:
        warnings.warn(why, stacklevel=1)
