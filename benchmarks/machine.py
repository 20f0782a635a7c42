"""What identifies a measurement: processor or card, driver, versions, date. Without torch."""

import os
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

STAMPED = ("torch", "triton", "transformers", "trl", "liger-kernel", "vllm")


def processor_name() -> str:
    names = ("model name", "Model", "CPU part")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(names))


@cache
def card() -> tuple[str, str] | None:
    """Name and driver of the first GPU, by nvidia-smi; None without one."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    name, _, driver = found.splitlines()[0].partition(", ")
    return name, driver


def cuda_here() -> bool:
    return card() is not None


def processor(device: str) -> str:
    """A title for the device's tables."""
    found = card() if device == "cuda" else None
    if found is not None:
        return found[0]
    return f"{processor_name()}, {os.environ.get('OMP_NUM_THREADS') or os.cpu_count()} threads"


def peak_of(card_name: str) -> float | None:
    """Published FLOP/s of a card in bfloat16 products; None: unknown."""
    if not card_name.startswith(("NVIDIA", "AMD Instinct")):
        return None  # without importing torch
    from trace_opd.trace.device_peak import published_peak

    return published_peak(card_name)


def versions() -> dict[str, str]:
    """Of the installed packages that a measurement depends on."""
    found = {}
    for name in STAMPED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def stamp(device: str) -> dict[str, str]:
    """Card, driver, versions and date of a result."""
    where = card() if device == "cuda" else None
    name, driver = where or (processor_name(), "")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"card": name, "driver": driver} | versions() | {"date": date}
