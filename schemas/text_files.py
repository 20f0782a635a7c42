"""Reading small text files that people write: configs (settings.py), prompts, prices
(annotators).
"""

import stat
from pathlib import Path

from .errors import InputError

_MOST_BYTES = 1 << 20


def read_text_file(path: str | Path, advice: str) -> str:
    """The text of a UTF-8 file of at most 1 MiB. advice: the end of the sentence in an error.

    Raises:
        InputError: no regular file, not readable, too large, or not UTF-8.
    """
    shown = f"{path!s:.300}"
    try:
        about = Path(path).stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe may block, a device may be endless
            raise InputError(f"{shown}: is no regular file; {advice}")
        with Path(path).open("rb") as file:
            # Files of the kernel (/proc/kmsg) have size 0 and may block.
            content = file.read(_MOST_BYTES + 1) if about.st_size else b""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{shown}: {reason}; {advice}") from None
    if len(content) > _MOST_BYTES:
        raise InputError(f"{shown}: is larger than {_MOST_BYTES:,} bytes; {advice}")
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise InputError(f"{shown}: is not UTF-8 text; save it as UTF-8") from None
