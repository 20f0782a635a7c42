"""Known vulnerabilities of what is locked, as pip-audit finds them: `make audit`.

Where its service is not reached pip-audit says that it found none and exits with 0. Here that reads
NOT AUDITED, with how many packages were looked up; a vulnerability that was found exits with 1.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# cuda.lock holds torch as the index names it, which the service knows; cpu.lock's wheel is the same.
LOCKS = ("build", "common", "cuda")


def main() -> int:
    command = ["pip_audit", "--disable-pip", "--require-hashes", "--format", "json"]
    command += ["--progress-spinner", "off"]
    for name in LOCKS:
        command += ["--requirement", str(ROOT / "requirements" / f"{name}.lock")]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )
    try:
        report = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"NOT AUDITED: pip-audit gave no report ({last[:200]})")
        return 0
    lines, code = verdict(report)
    print("\n".join(lines))
    return code


def verdict(report: dict[str, Any]) -> tuple[list[str], int]:
    """What pip-audit's JSON report says, in lines, and the exit code."""
    packages = report["dependencies"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, mended in "
        f"{', '.join(flaw['fix_versions']) or 'no release'}"
        for package in packages
        for flaw in package.get("vulns", [])
    ]
    looked_up = len(packages) - len(skipped)
    lines = [
        *found,
        f"audit: {looked_up} of {len(packages)} packages looked up, {len(found)} flaws",
    ]
    if not looked_up:
        lines.append("NOT AUDITED: no vulnerability service is reached from here")
    elif skipped:
        lines.append(f"NOT AUDITED: {', '.join(skipped)}")
    return lines, 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
