"""What nvidia-smi says of the GPUs: names, driver, clocks, limits."""

import shutil
import subprocess

GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.limit",
)
TIMEOUT_SECONDS = 20


def describe_gpus() -> list[dict[str, str]]:
    """Return the fields of each GPU with their units; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = run.stdout.splitlines() if run.returncode == 0 else []
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    return [dict(zip(GPU_FIELDS, row, strict=True)) for row in cells if len(row) == len(GPU_FIELDS)]
