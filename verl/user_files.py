"""Imports of users' own files and modules.

A user's file may import the files beside it. Only such a file and the files beside it see each other this way: modules of Python keep their
names, libraries are not affected, and files in two folders may import different helpers of one name.
"""

import builtins
import importlib
import importlib.util
import os
import signal
import sys
import sysconfig
import threading
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

from verl.errors import Stopped, UserError

FOLDER = "verl_folder_"  # a package of this name and a checksum has the files of a user's folder as its modules

SECONDS_BEFORE_NOTE = 10.0

_files: dict[Path, tuple[bytes, ModuleType]] = {}  # imported users' files: content and module by path


def from_file(path: Path, kind: str) -> ModuleType:
    """Import a file. Like any import, it runs only once, unless its content has changed."""
    if not path.is_file():
        raise UserError(f"no such file for a plugin of {kind}", where=str(path), fix=f"the current folder is {Path.cwd()}")
    place, source = path.resolve(), _read(path)
    before, module = _files.get(place, (None, None))
    if module is None or before != source:
        module = _run(path, source, package_of(place.parent, anew=module is not None))
        _files[place] = source, module
    return module


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="make the file readable") from error


def _run(path: Path, source: bytes, package: str) -> ModuleType:
    name = f"{package}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__builtins__"] = _builtins_of(package)
    sys.modules[name] = module
    try:
        with _on_path(module), ends_are_errors(), noted_if_slow(f"{path} is being imported"):
            # The spec's loader is not used, because it could load stale bytecode of a file that has just changed.
            exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        del sys.modules[name]
        raise _fails(error, module) from error
    return module


def _fails(error: BaseException, module: ModuleType) -> UserError:
    what = f"fails when it is imported: {type(error).__name__}: {error}"
    return UserError(what, where=place_of(error, module), fix="correct the file")


@contextmanager
def _on_path(module: ModuleType) -> Iterator[None]:
    """In this context, `importlib.import_module` finds the files beside a plugin, after all others."""
    folder = str(Path(module.__file__ or "").resolve().parent)
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextmanager
def ends_are_errors() -> Iterator[None]:
    """In this context, users' code cannot end the run without a word.

    `os._exit` raises SystemExit, except in forks. `raise KeyboardInterrupt` becomes a RuntimeError; Ctrl-C is still a KeyboardInterrupt.
    """
    leave, process = os._exit, os.getpid()

    def leave_or_raise(status: int) -> NoReturn:
        if os.getpid() != process:
            leave(status)
        raise SystemExit(status)

    os._exit = leave_or_raise
    try:
        with _interrupts_noticed() as interrupts:
            yield
    except KeyboardInterrupt as error:
        if interrupts or isinstance(error, Stopped):
            raise
        raise RuntimeError("raised KeyboardInterrupt").with_traceback(error.__traceback__) from None
    finally:
        os._exit = leave


@contextmanager
def _interrupts_noticed() -> Iterator[list[int]]:
    """Yield a list that gets an item for each SIGINT in this context. The handler of the signal is called as before."""
    found: list[int] = []
    handler = signal.getsignal(signal.SIGINT)

    def notice(number: int, frame: FrameType | None) -> None:
        found.append(number)
        if callable(handler):
            handler(number, frame)

    if threading.current_thread() is not threading.main_thread() or not callable(handler):  # Python allows handlers only there
        yield found
        return
    signal.signal(signal.SIGINT, notice)
    try:
        yield found
    finally:
        if signal.getsignal(signal.SIGINT) is notice:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def noted_if_slow(doing: str) -> Iterator[None]:
    """Print a line to standard error if this context lasts long, so that nobody waits for users' code without knowing it.

    Args:
        doing: what is being done, such as "mine.py is being imported".
    """

    def note() -> None:
        os.write(2, f"{doing}, for {SECONDS_BEFORE_NOTE:g} s so far\n".encode())

    timer = threading.Timer(SECONDS_BEFORE_NOTE, note)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def from_name(name: str, kind: str) -> ModuleType:
    """Import a dotted module. One that is not found is looked for in the current folder too, which a console script has not on its path."""
    try:
        with ends_are_errors(), noted_if_slow(f"{name} is being imported"):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = str(Path.cwd())
        if f"{name}.".startswith(f"{error.name}.") and not {"", here} & {*sys.path}:
            sys.path.append(here)
            importlib.invalidate_caches()
            return from_name(name, kind)
        fix = "check the spelling, install it, or give the path of a .py file"
        raise UserError(f"no module {error.name!r} for {kind} {name!r}", fix=fix) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        module = ModuleType(name)
        module.__file__ = getattr(_spec_of(name), "origin", None)
        raise _fails(error, module) from error


def _spec_of(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def is_own(module: ModuleType) -> bool:
    """Return whether a plugin is a user's own file or module, not one of verl."""
    return module.__name__.partition(".")[0] != "verl"


def place_of(error: BaseException, module: ModuleType) -> str:
    """Return the place of an error as `file.py:LINE`: the last line that was running in the plugin's own files (see `is_own_file`).

    Without such a line, it is the last line of all; a user's file without a line, if that is in verl: verl has called it wrongly then, as
    a function with other arguments.
    """
    if isinstance(error, SyntaxError) and error.filename is not None and Path(error.filename).is_file():
        return f"{error.filename}:{error.lineno}"
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [frame for frame in frames if is_own_file(frame[0], module)]
    if not frames or (not own and is_own(module) and Path(frames[-1][0]).is_relative_to(Path(__file__).parent)):
        return str(module.__file__)
    return "{}:{}".format(*(own or frames)[-1])


def is_own_file(filename: str, module: ModuleType) -> bool:
    """Return whether a file is the plugin's own, or below its folder and neither installed nor a part of Python."""
    path, folder = Path(filename).resolve(), Path(module.__file__ or "").resolve().parent
    others = (sysconfig.get_path("stdlib"), Path(__file__).parent)
    if not path.is_relative_to(folder) or any(path.is_relative_to(other) for other in others):
        return path == Path(module.__file__ or "").resolve()
    return "site-packages" not in path.relative_to(folder).parts


# The files beside a user's file


def package_of(folder: Path, *, anew: bool = False) -> str:
    """Return the name of the package whose modules are the files of a folder.

    Args:
        anew: forget the modules that have been imported from the folder, because a file has changed and others may have too.
    """
    name = f"{FOLDER}{zlib.crc32(bytes(folder)):08x}"
    if anew:
        for module in [module for module in sys.modules if module.startswith(f"{name}.")]:
            del sys.modules[module]
    if name not in sys.modules:
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(folder)]
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    importlib.invalidate_caches()
    return name


def _builtins_of(package: str) -> dict[str, Any]:
    """Return Python's built-in functions, with an `import` that finds the modules of a folder's package before installed ones."""
    return {**vars(builtins), "__import__": partial(_import, package)}


def _import(
    package: str,
    name: str,
    globals_: Mapping[str, object] | None = None,
    locals_: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """Import as Python's `__import__` does; `package` is that of the importing file's folder."""
    top = name.partition(".")[0]
    if level or not _is_beside(top, package):
        return builtins.__import__(name, globals_, locals_, fromlist or (), level)
    found = importlib.import_module(f"{package}.{name}")
    if not fromlist:  # `import top.below` gives `top`
        return sys.modules[f"{package}.{top}"]
    return builtins.__import__(f"{package}.{name}", globals_, locals_, fromlist) if hasattr(found, "__path__") else found


def _is_beside(top: str, package: str) -> bool:
    """Return whether a name means a module beside a user's file. It never does for a module of Python.

    An installed module comes second, but before a folder without `__init__.py`, which may hold data.
    """
    if not top or top in sys.stdlib_module_names:
        return False
    module = sys.modules.get(f"{package}.{top}")
    if module is not None and not isinstance(module.__loader__, _NeighbourLoader):
        return not _is_installed(top, module)  # the plugin itself: `from math_verify import …` in math_verify.py means the library
    path = Path(sys.modules[package].__path__[0], top)
    if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
        return True
    return path.is_dir() and _spec_of(top) is None


def _is_installed(name: str, own: ModuleType) -> bool:
    """Return whether a module of this name exists besides a plugin's own file."""
    spec = PathFinder.find_spec(name)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() != Path(own.__file__ or "").resolve()


class _NeighbourLoader(SourceFileLoader):
    """Runs a file beside a user's file, which may import its neighbours too."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = _builtins_of(module.__name__.partition(".")[0])
        super().exec_module(module)


class _NeighbourFinder:
    """Finds the modules of the packages of users' folders."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.startswith(FOLDER) else None
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _NeighbourLoader(spec.loader.name, spec.loader.path)
        return spec


_FINDER = _NeighbourFinder()
