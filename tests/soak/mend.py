"""A simulated user who follows the error messages: removes the files that they name and runs the
commands that they print. Used by trial.py.
"""

import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from trace_opd.tests.kill.harness import Run
from trace_opd.tests.soak.invariants import Broken

# Paths to remove, as messages name them.
_ADVICE = (
    re.compile(r"(/\S+): does not hold what was written(?: \([^;]*\))?; remove it"),
    re.compile(r"remove (/\S+) and (?:give|run) the command again"),
)
_FOLDER = re.compile(r"(/\S+): .*remove its folder")
_VERIFY = re.compile(r"`trace-opd (verify-store \S+)`")

Command = Callable[[Sequence[str]], Run]


def follow(text: str, root: Path, give: Command) -> int:
    """Follow a run's output for a store. give: runs a command line to its end.

    Returns the number of steps done. Raises Broken if the output asks to remove anything else.
    """
    # verify-store wraps its table at the terminal's width, but never its commands.
    done = 0
    for pattern in _ADVICE:
        for path in dict.fromkeys(pattern.findall(text)):
            done += _remove(Path(path), root)
    for path in dict.fromkeys(_FOLDER.findall(text)):
        done += _remove(Path(path).parent, root)
    for words in dict.fromkeys(_VERIFY.findall(text)):
        checked = give(shlex.split(words))
        done += follow(Path(checked.output[0]).read_text(), root, give)
    for line in text.splitlines():
        if not line.startswith("rm -r ") or " && " not in line:
            continue
        removal, again = line.split(" && ")
        for path in shlex.split(removal)[2:]:
            _remove(Path(path), root)
        program, *args = shlex.split(again)
        if program != "trace-opd":
            raise Broken(f"verify-store prints {line!r}")
        give(args)
        done += 1
    return done


def _remove(path: Path, root: Path) -> int:
    if not path.is_relative_to(root) or path == root:
        raise Broken(f"a sentence asks to remove {path}, which is not in the store")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
    else:
        return 0
    return 1
