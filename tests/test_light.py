"""What every start uses in place of typing and dataclasses makes the same classes as those do."""

from __future__ import annotations

import dataclasses
import pickle
import typing

import pytest

from pyvmm import light


class Ours(light.NamedTuple):
    gpa: int
    size: int = 4
    what: str = "segment"

    @property
    def end(self) -> int:
        return self.gpa + self.size


class Original(typing.NamedTuple):
    gpa: int
    size: int = 4
    what: str = "segment"

    @property
    def end(self) -> int:
        return self.gpa + self.size


@light.dataclass(frozen=True)
class OurExit:
    port: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class OriginalExit:
    port: int
    data: bytes


BOTH_TUPLES = pytest.mark.parametrize("kind", [Ours, Original])
BOTH_DATACLASSES = pytest.mark.parametrize("kind", [OurExit, OriginalExit])


@BOTH_TUPLES
def test_a_named_tuple_is_a_tuple_with_names_and_defaults(kind: type[Original]) -> None:
    made = kind(8, what="module")
    assert made == (8, 4, "module") and tuple(made) == (8, 4, "module")
    assert (made.gpa, made.size, made.what, made.end) == (8, 4, "module", 12)
    gpa, size, what = made
    assert (gpa, size, what) == (8, 4, "module")
    assert repr(made) == f"{kind.__name__}(gpa=8, size=4, what='module')"
    assert made._replace(size=1) == (8, 1, "module") and type(made._replace()) is kind
    assert made._fields == ("gpa", "size", "what") and made._asdict()["gpa"] == 8
    assert hash(made) == hash((8, 4, "module"))
    assert pickle.loads(pickle.dumps(made)) == made
    match made:
        case kind(gpa, size):
            assert (gpa, size) == (8, 4)


@BOTH_TUPLES
@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((1, 2, "x", 4), {}), ((1,), {"gpa": 2}), ((1,), {"colour": 2}), ((), {"size": 1})],
)
def test_wrong_values_for_a_named_tuple_are_an_error(
    kind: type, values: tuple[object, ...], named: dict[str, object]
) -> None:
    with pytest.raises(TypeError):
        kind(*values, **named)


@BOTH_TUPLES
def test_a_field_of_a_named_tuple_cannot_be_changed(kind: type) -> None:
    with pytest.raises(AttributeError):
        kind(1).gpa = 2


@BOTH_DATACLASSES
def test_a_dataclass_compares_shows_and_replaces_its_fields(kind: typing.Any) -> None:
    made = kind(0x3F8, data=b"H")
    assert made == kind(0x3F8, b"H") != kind(0x3F8, b"I")
    assert made != (0x3F8, b"H")
    assert repr(made) == f"{kind.__name__}(port=1016, data=b'H')"
    assert hash(made) == hash(kind(0x3F8, b"H"))
    assert dataclasses.is_dataclass(kind) and dataclasses.asdict(made)["port"] == 0x3F8
    assert dataclasses.replace(made, data=b"J") == kind(0x3F8, b"J")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.port = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        del made.port
    match made:
        case kind(port, _):
            assert port == 0x3F8


@BOTH_DATACLASSES
@pytest.mark.parametrize(
    ("values", "named"), [((), {}), ((1, b"", 3), {}), ((1,), {"port": 2}), ((1,), {"colour": 2})]
)
def test_wrong_values_for_a_dataclass_are_an_error(
    kind: type, values: tuple[object, ...], named: dict[str, object]
) -> None:
    with pytest.raises(TypeError):
        kind(*values, **named)
