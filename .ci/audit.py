"""Check the locked versions for known vulnerabilities with pip-audit.

    make audit

If its service is unreachable, pip-audit reports no vulnerabilities and exits with 0. This script
then prints NOT AUDITED and the number of packages checked. It exits with 1 if it finds a
vulnerability.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# cuda.lock holds torch under its index name, which the service knows; cpu.lock has the same
# version.
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
    """The lines to print for pip-audit's JSON report, and the exit code."""
    packages = report["dependencies"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in "
        f"{', '.join(flaw['fix_versions']) or 'no release'}"
        for package in packages
        for flaw in package.get("vulns", [])
    ]
    checked = len(packages) - len(skipped)
    lines = [
        *found,
        f"audit: {checked} of {len(packages)} packages checked, {len(found)} vulnerabilities",
    ]
    if not checked:
        lines.append("NOT AUDITED: no vulnerability service was reachable")
    elif skipped:
        lines.append(f"NOT AUDITED: {', '.join(skipped)}")
    return lines, 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
