"""Frozen dataclasses for modules that every start imports.

The standard library's `dataclasses` takes a quarter as long to import, and to make a dozen classes,
as Python takes to start.  So this makes the same class by hand; type checkers are shown the
original:

    if TYPE_CHECKING:
        from dataclasses import dataclass
    else:
        from pyvmm.frozen import dataclass

fields(), replace(), asdict(), is_dataclass() and `match` work as with the original.  Left out: all
of its options, default values, and fields of a base class.
"""

from __future__ import annotations

from typing import Any


class _Fields:
    """`__dataclass_fields__`, by which dataclasses' functions know one: made when asked for."""

    def __get__(self, instance: object, owner: Any) -> Any:
        import dataclasses

        annotations = [(name, owner.__annotations__[name]) for name in owner.__match_args__]
        original = dataclasses.make_dataclass(owner.__name__, annotations, frozen=True)
        owner.__dataclass_fields__ = vars(original)["__dataclass_fields__"]
        return owner.__dataclass_fields__


def dataclass(*, frozen: bool) -> Any:
    """The decorator; `frozen` must be True."""
    assert frozen
    return _make


def _make(cls: type) -> type:
    members = {
        "__match_args__": tuple(vars(cls).get("__annotations__", ())),
        "__dataclass_fields__": _Fields(),
        "__init__": _init,
        "__eq__": _eq,
        "__hash__": _hash,
        "__repr__": _repr,
        "__setattr__": _setattr,
        "__delattr__": _delattr,
    }
    for name, member in members.items():
        setattr(cls, name, member)
    return cls


def _init(self: Any, *values: Any, **named: Any) -> None:
    names = self.__match_args__
    if named or len(values) != len(names):
        values = _bind(self, values, named)
    vars(self).update(zip(names, values, strict=True))


def _bind(self: Any, values: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    rest = self.__match_args__[len(values) :]
    if len(values) > len(self.__match_args__) or set(named) != set(rest):
        wanted = ", ".join(self.__match_args__)
        raise TypeError(f"{type(self).__name__}({wanted}): one value is needed for each")
    return (*values, *(named[name] for name in rest))


def _eq(self: Any, other: object) -> bool:
    return type(other) is type(self) and vars(other) == vars(self)


def _hash(self: Any) -> int:
    return hash((type(self), *vars(self).values()))


def _repr(self: Any) -> str:
    fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
    return f"{type(self).__name__}({fields})"


def _setattr(self: Any, name: str, value: Any) -> None:
    _refuse(f"cannot assign to field {name!r}")


def _delattr(self: Any, name: str) -> None:
    _refuse(f"cannot delete field {name!r}")


def _refuse(message: str) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(message)
