"""Limits of memory and what a report says of them."""

from collections.abc import Callable
from typing import Any


def test_the_plan_is_in_the_json_of_the_run(make: Callable[..., Any]):
    made = make("memory_limit=1GB")
    memory = made.report["memory"]
    assert memory["limit_bytes"] == 10**9
    assert set(memory["stages"]) == {"text", "denoise", "decode"}
    assert memory["planned_peak_bytes"] == made.job.memory.peak_bytes
    assert made.report["config"]["memory_limit"] == "1GB"
