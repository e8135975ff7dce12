"""Plugins: files outside this package that add a task, a model, a merge, …; docs/plugins.md has one of each.

They are the *.py files of the folders that the environment variable `ATM_FL_PLUGINS` names (several separated as in
PATH), and the entry points of the group `atm_fl.plugins` of installed packages. Each is imported once in every process:
when a registry is first asked, which no process of a run comes by.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import linecache
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any, TypeVar

from atm_fl.errors import SettingError, did_you_mean

VARIABLE = "ATM_FL_PLUGINS"
GROUP = "atm_fl.plugins"
BUILT_IN = {
    "task": ("atm_fl.tasks",),
    "model": ("atm_fl.models",),
    "model library": ("atm_fl.models.hubs",),
    "head": ("atm_fl.models", "atm_fl.models.hubs"),
    "merge": ("atm_fl.merging",),
    "codec": ("atm_fl.codecs",),
    "transform": ("atm_fl.transforms",),
    "optimizer": ("atm_fl.optimizers",),
    "server-optimizer": ("atm_fl.merging.server_optimizer",),
    "metric sink": ("atm_fl.sinks",),
    "attack": ("atm_fl.attacks.poisoning",),
    "export format": ("atm_fl.exports.formats",),
}
"""Kind → the modules where this package's own are; all that are in them, of packages."""


@dataclass(frozen=True)
class Plugin:
    """A plugin: its file (or entry point) and the SHA-256 of the file, 16 hex digits."""

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{Path(self.name).name} {self.digest}"


Thing = TypeVar("Thing")
Decorated = TypeVar("Decorated")


class Registry(MutableMapping[str, Thing]):
    """All things of one kind by name, this package's own first. What asks it has loaded the plugins.

    SettingError, naming the file, when a plugin cannot be imported or takes a name that is taken.

    options: the options of a thing, which a text may give after its name (see `atm_fl.options`), as dataclass fields.
    elsewhere: names of options that are settings of their own. bare: whether older versions wrote one without its key.
    """

    def __init__(
        self,
        kind: str,
        options: Callable[[Any], Sequence[Any]] = lambda thing: (),
        elsewhere: Sequence[str] = (),
        bare: bool = False,
    ) -> None:
        self.kind = kind
        self.options, self.elsewhere, self.bare = options, elsewhere, bare
        self._things: dict[str, Thing] = {}
        self._plugins: dict[str, Plugin] = {}
        self._complete = False
        _loader.registries.append(self)

    def find(self, name: str, advice: str = "") -> Thing:
        """The thing called `name`. SettingError, which begins with `advice`, if there is none."""
        if name not in self:
            raise SettingError(f"{advice or f'{self.kind}={name!r}'} is unknown{did_you_mean(name, self)}")
        return self[name]

    def offering(self, options: Callable[[Any], Sequence[Any]]) -> Registry[Thing]:
        """The same things where a text may give other `options`, and none is a setting of its own."""
        view = copy(self)
        view.options, view.elsewhere = options, ()
        return view

    def plugin(self, name: str) -> Plugin | None:
        """The plugin that `name` comes from; None if it is none's, or there is no such thing."""
        self._load()
        return self._plugins.get(name)

    def register(
        self, name: str, make: Callable[[Any], Thing] = lambda decorated: decorated
    ) -> Callable[[Decorated], Decorated]:
        """Register what is decorated, or what `make` makes of it."""

        def add(decorated: Decorated) -> Decorated:
            self[name] = make(decorated)
            return decorated

        return add

    def import_built_in(self) -> None:
        """Import this package's own things of the kind."""
        if not self._complete:
            for name in BUILT_IN[self.kind]:
                module = importlib.import_module(name)
                for module_info in pkgutil.iter_modules(getattr(module, "__path__", ())):
                    importlib.import_module(f"{name}.{module_info.name}")
            self._complete = True

    def forget(self, plugin: Plugin) -> None:
        """Take out what `plugin` registered."""
        for name in [name for name, source in self._plugins.items() if source == plugin]:
            del self[name]

    def _load(self) -> None:
        self.import_built_in()
        load()

    def __setitem__(self, name: str, thing: Thing) -> None:
        plugin = _loader.loading
        if plugin and name in self._things:
            raise SettingError(f"the {self.kind} {name!r} is there already{_from(self._plugins.get(name))}; rename it")
        self._things[name] = thing
        if plugin:
            self._plugins[name] = plugin

    def __getitem__(self, name: str) -> Thing:
        self._load()
        return self._things[name]

    def __delitem__(self, name: str) -> None:
        del self._things[name]
        self._plugins.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(list(self._things))

    def __len__(self) -> int:
        self._load()
        return len(self._things)


class _Loader:
    """What this process has loaded."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.registries: list[Registry[Any]] = []
        self.named: str | None = None
        """The value of `ATM_FL_PLUGINS` whose files are loaded; None before the first time."""
        self.loading: Plugin | None = None
        self.done: dict[Plugin, ModuleType | None] = {}
        """Those that are loaded, files' with their modules."""


_loader = _Loader()


def load() -> None:
    """Import what is not imported yet of the files and entry points. SettingError names the one that cannot be."""
    named = os.environ.get(VARIABLE, "")
    if named == _loader.named:
        return
    with _loader.lock:
        if _loader.loading or named == _loader.named:  # a plugin itself asks, or another thread was first
            return
        files, points = _files(named), entry_points(group=GROUP)
        if files or points:
            # First, for whatever is registered while a plugin is imported is the plugin's.
            for name in [name for names in BUILT_IN.values() for name in names]:
                importlib.import_module(name)
            for registry in _loader.registries:
                registry.import_built_in()
        wanted = {str(file) for file in files}
        for plugin, module in list(_loader.done.items()):
            if module and plugin.name not in wanted:
                _forget(plugin)
        known = {plugin.name for plugin in _loader.done}
        for point in points:
            if _name(point) not in known:
                _load_point(point)
        for file in files:
            if str(file) not in known:
                _load_file(file)
        _loader.named = named


def loaded() -> dict[Plugin, list[str]]:
    """The plugins of this process, and of each what it has added, as "codec 'sign'"."""
    load()
    return {
        plugin: [
            f"{registry.kind} {name!r}"
            for registry in _loader.registries
            for name in registry
            if registry.plugin(name) == plugin
        ]
        for plugin in _loader.done
    }


def absolute() -> dict[str, str]:
    """The environment variable with absolute folders, for a process that begins in another one; empty without any."""
    named = os.environ.get(VARIABLE, "")
    return {VARIABLE: os.pathsep.join(str(folder) for folder in _folders(named))} if named else {}


def _folders(named: str) -> list[Path]:
    return [Path(folder).expanduser().resolve() for folder in named.split(os.pathsep) if folder]


def _files(named: str) -> list[Path]:
    for folder in _folders(named):
        if not folder.is_dir():
            raise SettingError(f"{VARIABLE}: {folder} is not a folder; it holds folders with *.py files")
    return list(dict.fromkeys(file for folder in _folders(named) for file in sorted(folder.glob("*.py"))))


def _from(plugin: Plugin | None) -> str:
    return f" (from {plugin.name})" if plugin else ""


def _name(point: EntryPoint) -> str:
    return f"entry point {point.name} = {point.value}"


def digest(content: bytes) -> str:
    """Of a plugin's file: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def _load_file(file: Path) -> None:
    """Run a file as a module of its own; the bytes that run are those of the digest."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SettingError(f"plugin {file} cannot be read ({error.strerror}); chmod a+r it, or remove it") from error
    plugin = Plugin(str(file), digest(content))
    module = ModuleType(f"atm_fl_plugin_{file.stem}_{digest(str(file).encode())}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where dataclasses and inspect look
    linecache.checkcache(str(file))
    with _loading(plugin, str(file)):
        exec(compile(content, str(file), "exec", dont_inherit=True), module.__dict__)
    _loader.done[plugin] = module


def _load_point(point: EntryPoint) -> None:
    """Import what an entry point names; its digest is that of the module's file."""
    origin = ""
    with _loading(Plugin(_name(point), ""), ""):
        spec = importlib.util.find_spec(point.module)
        origin = (spec and spec.origin) or ""
    plugin = Plugin(_name(point), digest(Path(origin).read_bytes()) if Path(origin).is_file() else "")
    with _loading(plugin, origin):
        point.load()
    _loader.done[plugin] = None


@contextmanager
def _loading(plugin: Plugin, file: str) -> Iterator[None]:
    """What is registered here is `plugin`'s; an error in it is a SettingError that names it, and nothing stays."""
    _loader.loading = plugin
    try:
        yield
    except (Exception, SystemExit) as error:
        _forget(plugin)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f"{plugin.name}, line {lines[-1]}" if lines else plugin.name
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, SettingError) else f"{type(error).__name__}: "
        raise SettingError(f"plugin {place}: {kind}{reason}") from error
    finally:
        _loader.loading = None


def _forget(plugin: Plugin) -> None:
    for registry in _loader.registries:
        registry.forget(plugin)
    module = _loader.done.pop(plugin, None)
    if module:
        sys.modules.pop(module.__name__, None)
