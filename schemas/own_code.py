"""Code of your own: classes and functions that a config names as `file.py:Class` or `module:Class`.

Samplers, annotators, sources of problems, rewards and route rules are loaded here, and nowhere
else. The file's SHA-256 goes into dataset ids. What the file imports does not, so a change there
needs a change in the file too, such as a version number.
"""

import hashlib
import importlib
import importlib.util
import inspect
import logging
import stat
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from .errors import InputError, OwnCodeError, Stopped

logger = logging.getLogger(__name__)

MANUAL = "docs/your-own.md has its protocol"
_LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class OwnCode:
    """A class or function of the user's.

    where: the config's field; name: its value; file: None for a module without Python source;
    sha256: of the file.
    """

    where: str
    name: str
    file: Path | None
    sha256: str
    value: Any

    @property
    def label(self) -> str:
        """For errors; a file without its folder, which a plan makes absolute."""
        place, _, attribute = self.name.rpartition(":")
        return f"{self.where} {PurePath(place).name if _is_file(place) else place}:{attribute}"


# By module or file: the hash of the source that was executed, and its module.
_loaded: dict[str, tuple[str, ModuleType, Path | None]] = {}


def is_own(name: object) -> bool:
    """Whether a config's value names code of the user's own."""
    return isinstance(name, str) and ":" in name


def short_name(name: str) -> str:
    """The name without folders, for dataset ids: `sampler:Class` for `x/sampler.py:Class`."""
    place, _, attribute = name.rpartition(":")
    return f"{PurePath(place).stem if _is_file(place) else place}:{attribute}"


def absolute_name(name: str) -> str:
    """The name with the file's absolute path, for workers that run in another folder."""
    place, _, attribute = name.rpartition(":")
    return f"{_absolute(place)}:{attribute}" if _is_file(place) else name


def load(name: str, where: str, sha256: str | None = None) -> OwnCode:
    """The class or function of that name; its module is executed again if its source has changed.

    where: the config's field, for errors; sha256: of the source that a run began with.

    Raises:
        InputError: no such file, module, class or function, a module that fails when it is
            imported, or another source than the one that the run began with.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise InputError(
            f"{where} {name!r}: write file.py:Class or module:Class, with a function's name where "
            "a function is meant"
        )
    found, module, file = _module(place, f"{where} {name!r}")
    if sha256 not in (None, found):
        raise InputError(
            f"{where} {name!r}: the file has changed since this run began; give the same command "
            "again, which makes another dataset"
        )
    value = getattr(module, attribute, None)
    if not callable(value):
        there = [
            key
            for key, one in vars(module).items()
            if callable(one) and getattr(one, "__module__", None) == module.__name__
        ]
        raise InputError(
            f"{where} {name!r}: {_shown(place)} has no class or function {attribute}; it has "
            f"{', '.join(there) or 'none'}"
        )
    return OwnCode(where, name, file, found, value)


def loaded(name: str, where: str) -> OwnCode:
    """As `load`, without reading the file again; for calls per row."""
    place, _, attribute = name.rpartition(":")
    if place in _loaded:
        sha256, module, file = _loaded[place]
        if callable(value := getattr(module, attribute, None)):
            return OwnCode(where, name, file, sha256, value)
    return load(name, where)


@contextmanager
def running(code: OwnCode) -> Iterator[None]:
    """Turn an exception in the user's code into one sentence with the line in the user's file.

    Raises:
        OwnCodeError: in place of any exception but those of this program.
    """
    try:
        yield
    except (InputError, Stopped):
        raise
    except (Exception, SystemExit) as error:
        logger.debug("%s failed", code.label, exc_info=True)
        sentence = f"{code.label}: {failure(error, code.file)}"
    else:
        return
    raise OwnCodeError(f"{sentence}; TRACE_OPD_LOG=DEBUG prints the traceback")


def failure(error: BaseException, file: Path | None) -> str:
    """Where in the file an exception arose, its type and message, as one line."""
    message = " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
    message = message[:_LONGEST_MESSAGE]
    if isinstance(error, SyntaxError) and file is not None and error.filename == str(file):
        return f"{file.name}, line {error.lineno}: {message}"
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if file is not None and frame.filename == str(file):
            return f"{file.name}, line {frame.lineno}, in {frame.name}: {message}"
    return message


def build(code: OwnCode, options: dict[str, Any], **given: Any) -> Any:
    """An instance of the user's class: called with those of `options` and `given` that it takes.

    options: validated by the class's `Options`, a pydantic model or a dataclass, if it has one.

    Raises:
        InputError: options that the class refuses or does not take; OwnCodeError: it raises.
    """
    if not isinstance(code.value, type):
        raise InputError(f"{code.label}: is no class; {MANUAL}")
    takes = inspect.signature(code.value).parameters
    if options and "options" not in takes:
        raise InputError(
            f"{code.label}: takes no options; remove them, or give its __init__ the parameter "
            "`options`"
        )
    given = given | {"options": _validated(code, options)}
    with running(code):
        return code.value(**{name: value for name, value in given.items() if name in takes})


def require_methods(code: OwnCode, **signatures: str) -> None:
    """Check that the class has the methods; signatures: the arguments of each, by position.

    Raises:
        InputError: it lacks one, or has one that is async or takes other arguments.
    """
    for name, signature in signatures.items():
        method = getattr(code.value, name, None)
        if not callable(method):
            raise InputError(f"{code.label}: has no method {name}({signature}); {MANUAL}")
        if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
            raise InputError(f"{code.label}: {name} is async; define it without async; {MANUAL}")
        given = signature.split(", ")
        if inspect.isfunction(inspect.getattr_static(code.value, name)):
            given = ["self", *given]
        try:
            inspect.signature(method).bind(*given)
        except TypeError as error:
            raise InputError(
                f"{code.label}: {name}: {error}; it is called as {name}({signature}); {MANUAL}"
            ) from None


def iterable(code: OwnCode, method: str, returned: Any) -> Iterable[Any]:
    """What a method returned, if it can be iterated.

    Raises:
        InputError: it cannot, as None of a method without `return`.
    """
    if not isinstance(returned, Iterable):
        kind = type(returned).__name__
        raise InputError(f"{code.label}: {method} returned {kind}, not a list; {MANUAL}")
    return returned


def is_text(value: object) -> bool:
    """Whether a table can hold a value as text: half of a surrogate pair has no encoding."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def _validated(code: OwnCode, options: dict[str, Any]) -> Any:
    kind: Any = getattr(code.value, "Options", None)
    if kind is None:
        return options
    if is_dataclass(kind):
        known = [field.name for field in fields(kind)]
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        extra = kind.model_config.get("extra") == "allow"
        known = [*options] if extra else [*kind.model_fields]
    else:
        raise InputError(f"{code.label}: Options is neither a dataclass nor a pydantic model")
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}" if near else f"known: {', '.join(known) or 'none'}"
            raise InputError(f"{code.label}: options.{name} is unknown; {hint}")
    model: Any = kind
    try:
        return TypeAdapter(model).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, ("options", *first["loc"])))
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{code.label}: {at}: {reason} (got {first['input']!r:.80})") from None


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


def _absolute(place: str) -> Path:
    return Path(place).expanduser().resolve()


def _shown(place: str) -> str:
    return PurePath(place).name if _is_file(place) else f"module {place}"


def _module(place: str, label: str) -> tuple[str, ModuleType, Path | None]:
    """The hash of the source, the module, and its file."""
    file = _absolute(place) if _is_file(place) else _file_of_module(place, label)
    try:
        source = b"" if file is None else _source(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"{label}: {place}: {reason}; name a Python file, from the folder in which the command "
            "runs"
        ) from None
    sha256 = hashlib.sha256(source).hexdigest()
    known = _loaded.get(place)
    if known is None or (known[0], known[2]) != (sha256, file):
        try:
            if file is not None and _is_file(place):
                module = _executed(file, source)
            elif file is not None and place not in sys.modules:
                module = _imported(place, source, file)
            elif file is not None and known is not None and known[1] is sys.modules[place]:
                module = _run(source, file, known[1])
            else:
                module = importlib.import_module(place)
        except (Exception, SystemExit) as error:
            logger.debug("%s cannot be imported", label, exc_info=True)
            sentence = f"{label}: cannot be imported ({failure(error, file)}); mend the file"
        else:
            known = _loaded[place] = sha256, module, file
            return known
        raise InputError(sentence)
    return known


def _source(file: Path) -> bytes:
    """Raises OSError, or ValueError for a device: /dev/zero has no end."""
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError("is no regular file")
    return file.read_bytes()


def _executed(file: Path, source: bytes) -> ModuleType:
    """The module of a file. Its folder is importable, so that it may use files next to it."""
    name = f"trace_opd_own.{hashlib.sha256(bytes(file)).hexdigest()[:8]}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise ImportError("is no Python file (.py)")
    _importable(file.parent)
    return _created(spec, source, file)


def _imported(name: str, source: bytes, file: Path) -> ModuleType:
    """The module of that name, found as an import finds it."""
    spec = importlib.util.find_spec(name)  # imports the packages that it is in
    assert spec is not None, "its file was found"
    module = _created(spec, source, file)
    package, _, own = name.rpartition(".")
    if package:
        setattr(sys.modules[package], own, module)
    return module


def _created(spec: ModuleSpec, source: bytes, file: Path) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pydantic look a class's module up
    try:
        return _run(source, file, module)
    except BaseException:
        del sys.modules[spec.name]
        raise


def _run(source: bytes, file: Path, module: ModuleType) -> ModuleType:
    # Not the spec's loader: it takes compiled code of the same size and second for the same, also
    # of an earlier process.
    exec(compile(source, str(file), "exec"), vars(module))  # noqa: S102 - asked for by name
    return module


def _file_of_module(name: str, label: str) -> Path | None:
    _importable(Path.cwd())  # a run's workers start elsewhere
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
    except (Exception, SystemExit) as error:
        logger.debug("%s cannot be imported", label, exc_info=True)
        sentence = f"{label}: module {name} cannot be imported ({failure(error, None)})"
    else:
        file = None if spec.origin is None else Path(spec.origin)
        return file if file is not None and file.suffix == ".py" else None
    raise InputError(
        f"{sentence}; run in its folder, add it to PYTHONPATH, or name the file (file.py:…)"
    )


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
