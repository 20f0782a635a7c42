"""SHA-256 of a folder's files, in the file that `sha256sum -c SHA256SUMS` checks."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .identity import sha256_of

CHECKSUMS = "SHA256SUMS"
_LOADED = (".safetensors", ".json")  # what a loader would take up beside the listed files


def write_checksums(folder: Path) -> None:
    """List all files of a folder; the last file that is written to it."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    lines = [
        f"{digest}  {name}\n" for name, digest in zip(names, _digests(folder, names), strict=True)
    ]
    (folder / CHECKSUMS).write_text("".join(lines))


def damage(folder: Path, read: bool = True) -> str | None:
    """How a folder differs from its list, None if it does not; without a list there is no damage.

    read: False looks at names and safetensors headers alone, which takes milliseconds: it finds what
    is missing or torn.

    Raises:
        OSError: a file cannot be read.
    """
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            return f"{file.name} is torn ({error})"
    sums = folder / CHECKSUMS
    if not sums.exists():
        return None
    try:
        listed = {name: digest for digest, name in map(_fields, sums.read_text().splitlines())}
    except ValueError:
        return f"{CHECKSUMS} is no list of checksums"
    if not listed:
        return f"{CHECKSUMS} is empty"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    if gone := sorted(listed.keys() - there):
        return f"{gone[0]} is missing"
    foreign = [name for name in sorted(there - listed.keys()) if name.endswith(_LOADED)]
    if foreign:
        return f"{foreign[0]} was not written with it"
    if read:
        found = _digests(folder, list(listed))
        for (name, digest), now in zip(listed.items(), found, strict=True):
            if digest != now:
                return f"{name} does not hold what was written"
    return None


def _fields(line: str) -> tuple[str, str]:
    digest, name = line.split("  ", 1)
    return digest, name


def _digests(folder: Path, names: list[str]) -> list[str]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: sha256_of(folder / name), names))
