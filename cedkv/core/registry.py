"""Registries: what a configuration chooses by name, built in or brought by another package."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cedkv.core.errors import CedkvError, ConfigError
from cedkv.core.source import module_digest
from cedkv.core.text import near_match, one_line, preview

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")
ImplT = TypeVar("ImplT")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)*")
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Registry(Generic[T]):
    """Implementations of one kind of extension, by name.

    An implementation comes from one of four places, and is imported only when it is asked for:

    1. the table of built-in ones: name -> ``package.module:attribute``;
    2. the decorator ``@REGISTRY.register("name")``;
    3. an entry point of an installed distribution, in the group ``group``;
    4. the name itself, where it is a reference ``package.module:attribute``.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str], base: str | None = None) -> None:
        """Create a registry.

        Args:
            kind: what is registered, for messages: ``selector``.
            group: entry point group, ``cedkv.selectors``.
            builtin: built-in names in their order, each with its reference.
            base: reference of the class that implementations derive from; None for functions.
        """
        self.kind, self.group, self.builtin = kind, group, dict(builtin)
        self._base = base
        self._loaded: dict[str, T] = {}
        self._registered: dict[str, T] = {}

    def names(self) -> list[str]:
        """Return all names: the built-in ones in their order, then those of other packages."""
        return [*self.builtin, *sorted({*self._registered, *self._entry_points} - self.builtin.keys())]

    def check(self, name: str) -> str:
        """Return the name if an implementation can be found under it; only a reference is imported for that.

        Raises:
            ConfigError: no such name, with the nearest one; a reference that cannot be imported.
        """
        if not self._named(name):
            self.get(name)
        return name

    def get(self, name: str) -> T:
        """Return the implementation registered under a name.

        Raises:
            ConfigError: as ``check``; or the implementation cannot be imported, or is not of this kind.
        """
        if name not in self._loaded:
            self._loaded[name] = self._find(name)
        return self._loaded[name]

    def register(self, name: str) -> Callable[[ImplT], ImplT]:
        """Return a decorator that registers a class or function under a name.

        Raises:
            ConfigError: the name is taken, is no identifier, or what is decorated is not of this kind.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{self.kind} name {preview(name)} is no identifier; use letters, digits and underscores")
        if name in self.builtin or name in self._registered or name in self._entry_points:
            raise ConfigError(f"{self.kind} {preview(name)} is registered already; give yours another name")

        def decorate(implementation: ImplT) -> ImplT:
            self._registered[name] = self._checked(name, implementation)
            return implementation

        return decorate

    def name_of(self, implementation: type) -> str:
        """Return the name under which ``get`` finds a class: its registered one, or a reference to it.

        Raises:
            ConfigError: the class is not of this kind, or is defined where it cannot be imported from (inside a function).
        """
        reference = f"{implementation.__module__}:{implementation.__qualname__}"
        registered = next((name for name, known in self._registered.items() if known is implementation), None)
        built_in = next((name for name, given in self.builtin.items() if given == reference), None)
        name = registered or built_in or reference
        if name == reference:
            if not _REFERENCE.fullmatch(reference):
                raise ConfigError(
                    f"{self.kind} {preview(reference)} is defined inside a function, where no configuration can name it; "
                    "define it at the top of a module, or register it"
                )
            self._loaded[name] = self._checked(name, implementation)  # a notebook's cell may define it anew
        return name

    def provider(self, name: str) -> str | None:
        """Return who provides an implementation: ``distribution version``, or a module; None for built-in ones."""
        if name in self.builtin:
            return None
        point = self._entry_points.get(name)
        if point is not None and name not in self._registered:
            return _distribution(point)
        return str(getattr(self.get(name), "__module__", name))

    def source(self, name: str) -> str | None:
        """Return the digest of the module that holds an implementation; None for built-in ones, and where it has no file."""
        return None if name in self.builtin else module_digest(str(getattr(self.get(name), "__module__", name)))

    def module_to_import(self, name: str) -> str | None:
        """Return the module that another process has to import to know the name; None where the name is enough."""
        if name in self._registered:
            return str(getattr(self._registered[name], "__module__", name))
        module = name.partition(":")[0]
        return module if module == "__main__" else None

    def external(self) -> list[str]:
        """Return the names that are not built in."""
        return self.names()[len(self.builtin) :]

    @contextmanager
    def errors_named(self, name: str, context: str = "") -> Iterator[None]:
        """Turn an unforeseen error of another package's implementation into a ConfigError that names it.

        Args:
            context: on what it was called, for the message: ``sample on-3``.
        """
        try:
            yield
        except CedkvError:
            raise
        except Exception as error:
            if name in self.builtin:
                raise
            message = one_line(error)
            raise ConfigError(
                f"{self.kind} {preview(name)} of {self.provider(name)} raised {type(error).__name__}: {message}"
                f"{context and f' ({context})'}; correct that package (--debug shows where)"
            ) from error

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        from importlib.metadata import entry_points  # looks at every installed distribution; built-in names do without

        points: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if point.name in self.builtin or point.name in points:
                first = _distribution(points[point.name]) if point.name in points else "cedkv itself"
                raise ConfigError(
                    f"{_distribution(point)} names its {self.kind} {point.name}, as {first} does: one of the two would be left "
                    "out; rename it in its package, or uninstall that package"
                )
            points[point.name] = point
        return points

    def _named(self, name: str) -> bool:
        """Return True for a registered name and False for a reference; raise ConfigError for anything else."""
        if name in self.builtin or name in self._registered or name in self._entry_points:
            return True
        if _REFERENCE.fullmatch(name):
            return False
        raise ConfigError(f"no {self.kind} is named {preview(name)}{near_match(name, self.names())}")

    def _find(self, name: str) -> T:
        if name in self._registered:
            return self._registered[name]
        if not self._named(name):
            reference = name
        elif name in self.builtin:
            reference = self.builtin[name]
        else:
            point = self._entry_points[name]
            reference = f"{point.module}:{point.attr}"
        return self._checked(name, self._imported(name, reference))

    def _imported(self, name: str, reference: str) -> Any:
        module, _, attribute = reference.partition(":")
        try:
            return attrgetter(attribute)(importlib.import_module(module))
        except Exception as error:  # whatever a module of somebody else's raises when it is imported
            raise ConfigError(
                f"{self.kind} {preview(name)} cannot be imported from {reference}: {type(error).__name__}: "
                f"{one_line(error)}; install its package again, or correct the reference"
            ) from error

    def _checked(self, name: str, implementation: Any) -> T:
        if self._base is None:
            if not callable(implementation):
                raise ConfigError(f"{self.kind} {preview(name)} is a {type(implementation).__name__}, not a function")
        else:
            base = self._imported(name, self._base)
            if not (isinstance(implementation, type) and issubclass(implementation, base)):
                raise ConfigError(
                    f"{self.kind} {preview(name)} is {preview(implementation)}, not a class derived from "
                    f"{self._base.replace(':', '.')}"
                )
        checked: T = implementation
        return checked


def _distribution(point: EntryPoint) -> str:
    """Return name and version of the distribution that brings an entry point."""
    return point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"


def build(cls: type[T], params: Mapping[str, Any], key: str) -> T:
    """Create an object of a frozen dataclass from the parameters a configuration gives it.

    Args:
        params: field name -> value; fields left out keep their defaults.
        key: the configuration key of the parameters, for messages.

    Raises:
        ConfigError: a parameter the class does not have (with the nearest one), one that is missing, or a value of another
            type, or one that the class itself rejects.
    """
    from pydantic import TypeAdapter, ValidationError

    names = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for name in params:
        if name not in names:
            hint = near_match(name, names) if names else "; it takes none: parameters are fields of a frozen dataclass"
            raise ConfigError(f"{key}: {cls.__name__} has no parameter {preview(name)}{hint}")
    missing = [n for n, f in names.items() if n not in params and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"{key}: {cls.__name__} needs {', '.join(missing)}; set {key}.{missing[0]}")
    try:
        return TypeAdapter(cls).validate_python(dict(params)) if params else cls()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise ConfigError(f"{key}: {message}") from None
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{key}.{place}: {message[0].lower()}{message[1:]}, not {preview(first['input'])}") from None
