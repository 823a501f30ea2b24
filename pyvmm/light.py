"""What every start needs of `typing` and `dataclasses`, without importing them.

Those two, and the classes that they make with exec(), take half as long as Python takes to start.
Type checkers are shown the originals.  For Python these names are as little as a running program
needs: `NamedTuple` and `dataclass` make the same classes without exec(), and the rest, which are
annotations, do nothing.

Left out of the dataclasses: all options but `frozen`, default values, and fields of a base class;
fields(), replace(), asdict(), is_dataclass() and `match` work.  Left out of the named tuples:
_make() and the functional form.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter

__all__ = [
    "TYPE_CHECKING",
    "Any",
    "NamedTuple",
    "NoReturn",
    "Protocol",
    "TypeVar",
    "cast",
    "dataclass",
]

TYPE_CHECKING = False  # the name that type checkers take for true

if TYPE_CHECKING:
    from dataclasses import dataclass
    from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar, cast
else:
    Any = NoReturn = None

    class Protocol:
        """A class that other classes fit without deriving from it."""

    def TypeVar(name, **_):
        """A name that stands for any type."""
        return name

    def cast(_, value):
        """The value itself."""
        return value

    class NamedTuple(tuple):
        """A tuple whose items, the annotations of a class that derives from this, have names."""

        __slots__ = ()
        _fields = __match_args__ = ()

        def __init_subclass__(cls):
            names = tuple(vars(cls).get("__annotations__", ()))
            cls._fields = cls.__match_args__ = names
            cls._field_defaults = {name: vars(cls)[name] for name in names if name in vars(cls)}
            for index, name in enumerate(names):
                setattr(cls, name, property(itemgetter(index)))

        def __new__(cls, *values, **named):
            if named or len(values) != len(cls._fields):
                values = _bind(cls, values, named, cls._field_defaults)
            return tuple.__new__(cls, values)

        def __getnewargs__(self):
            return tuple(self)

        def __repr__(self):
            return _repr(self, self._asdict())

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def _replace(self, **named):
            return type(self)(**self._asdict() | named)

    def dataclass(*, frozen):
        """The decorator; `frozen` must be True."""
        assert frozen
        return _make_dataclass


class _Fields:
    """`__dataclass_fields__`, by which dataclasses' functions know one: made when asked for."""

    def __get__(self, instance: object, owner: Any) -> Any:
        import dataclasses

        annotations = [(name, owner.__annotations__[name]) for name in owner.__match_args__]
        original = dataclasses.make_dataclass(owner.__name__, annotations, frozen=True)
        owner.__dataclass_fields__ = vars(original)["__dataclass_fields__"]
        return owner.__dataclass_fields__


def _make_dataclass(cls: type) -> type:
    members = {
        "__match_args__": tuple(vars(cls).get("__annotations__", ())),
        "__dataclass_fields__": _Fields(),
        "__init__": _init,
        "__eq__": lambda self, other: type(other) is type(self) and vars(other) == vars(self),
        "__hash__": lambda self: hash((type(self), *vars(self).values())),
        "__repr__": lambda self: _repr(self, vars(self)),
        "__setattr__": lambda self, name, _: _refuse(f"cannot assign to field {name!r}"),
        "__delattr__": lambda self, name: _refuse(f"cannot delete field {name!r}"),
    }
    for name, member in members.items():
        setattr(cls, name, member)
    return cls


def _init(self: Any, *values: Any, **named: Any) -> None:
    names = self.__match_args__
    if named or len(values) != len(names):
        values = _bind(type(self), values, named, {})
    vars(self).update(zip(names, values, strict=True))


def _bind(
    cls: Any, values: tuple[Any, ...], named: dict[str, Any], defaults: dict[str, Any]
) -> tuple[Any, ...]:
    """The values of all fields, in their order."""
    rest = cls.__match_args__[len(values) :]
    known = defaults | named
    if len(values) + len(rest) > len(cls.__match_args__) or not set(named) <= set(rest) <= set(
        known
    ):
        wanted = ", ".join(cls.__match_args__)
        raise TypeError(f"{cls.__name__}({wanted}): one value is needed for each")
    return (*values, *(known[name] for name in rest))


def _repr(instance: object, fields: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return f"{type(instance).__name__}({shown})"


def _refuse(message: str) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(message)
