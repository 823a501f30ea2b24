"""The shape of the program: imports go one way, and some modules are only for some layers."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "pyvmm"

# From the bottom up: nothing imports what stands in a later line, not even through other modules.
# Modules that are not here are free to be anywhere, as long as there is no cycle.
LAYERS = (
    {"errors", "version", "kvm", "rsp", "bus", "exits"},
    {"handles", "memory", "x86", "paging", "coalesced", "registers"},
    {"debuggedset", "vcpuaccess", "hypervisor", "devices", "boot", "stub"},
    {"vcpu"},
    {"machine"},
    {"debug"},
    {"cli", "testing"},
    {"__main__"},
)

# Imports inside of a function, of what most runs do not need: (importer, imported).
LAZY = {
    ("memory", "paging"),
    ("hypervisor", "hostprobe"),
    ("hypervisor", "reset"),
    ("vcpuaccess", "cpucopy"),
    ("hypervisor", "injection"),
    ("vcpuaccess", "injection"),
    ("hypervisor", "stepping"),
    ("cpucopy", "completions"),
    ("machine", "boot.tables"),
    ("machine", "idle"),
    ("machine", "screen"),
    ("machine", "virtio_bus"),
    ("cli", "disk"),
    ("cli", "devices.virtio_blk"),
    ("cli", "devices.virtio_console"),
    ("cli", "devices.virtio_rng"),
    ("cli", "screen"),
    ("cli", "symbols"),
    ("machine", "report"),
    ("cli", "probereport"),
    ("cli", "trace"),
}


def module_name(path: Path) -> str:
    """`pyvmm/boot/elf.py` -> `boot.elf`, `pyvmm/boot/__init__.py` -> `boot`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if len(parts) > 1 and parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


SOURCES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path))
    for path in sorted(PACKAGE.rglob("*.py"))
}


def is_for_type_checkers_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(module: str, *, lazy: bool) -> set[str]:
    """What `module` imports when it is itself imported, or (`lazy`) inside of its functions."""
    found: set[str] = set()

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.stmt) and is_for_type_checkers_only(node):
            return
        if inside == lazy and isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if inside == lazy and isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                found.add(f"{node.module}.{alias.name}")
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(SOURCES[module], False)
    return found


def ours(names: set[str]) -> set[str]:
    """The modules of pyvmm among `names`: `pyvmm.kvm.KVM_RUN` -> `kvm`."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] != "pyvmm":
            continue
        for length in (3, 2):
            if ".".join(parts[1:length]) in SOURCES:
                found.add(".".join(parts[1:length]))
                break
        else:
            found.add("__init__")
    return found


@functools.lru_cache
def graph() -> dict[str, set[str]]:
    return {module: ours(imports(module, lazy=False)) for module in SOURCES}


def layer_of(module: str) -> int | None:
    for number, layer in enumerate(LAYERS):
        if module in layer or module.partition(".")[0] in layer:
            return number
    return None


def reachable(module: str) -> set[str]:
    """What is imported, directly or not, by importing `module`."""
    edges, seen, todo = graph(), set(), [module]
    while todo:
        for imported in edges[todo.pop()]:
            if imported not in seen:
                seen.add(imported)
                todo.append(imported)
    return seen


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_a_lower_module_never_imports_a_higher_one(module: str) -> None:
    own = layer_of(module)
    if own is None or module == "__init__":
        return
    higher = {m: layer_of(m) for m in reachable(module) if (layer_of(m) or 0) > own}
    assert higher == {}


def test_no_module_imports_itself_through_others() -> None:
    assert [module for module in SOURCES if module in reachable(module)] == []


def test_nobody_inside_imports_the_public_names() -> None:
    assert [module for module, imported in graph().items() if "__init__" in imported] == []


def test_the_few_imports_inside_of_functions_are_known() -> None:
    found = {
        (module, imported) for module in SOURCES for imported in ours(imports(module, lazy=True))
    }
    # debug.py and its kin may have reasons of their own; what a plain run touches may not grow.
    plain = {"memory", "hypervisor", "machine", "vcpu", "bus", "coalesced", "boot", "cli", "kvm"}
    unknown = {pair for pair in found - LAZY if pair[0] in plain and pair[1] != "debug"}
    assert unknown == set()


def test_the_tour_of_the_code_names_every_module() -> None:
    tour = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)[/*]?`", tour))
    modules = {module.partition(".")[0] for module in SOURCES} - {"__init__", "__main__"}
    unnamed = {m for m in modules - named if not (m.startswith("stub") and "`stub*`" in tour)}
    assert unnamed == set()


def users_of(library: str) -> set[str]:
    """The modules that import `library` from Python's standard library."""
    return {
        module
        for module in SOURCES
        for name in imports(module, lazy=False) | imports(module, lazy=True)
        if name.partition(".")[0] == library
    }


def test_ctypes_is_used_only_where_the_kernel_s_or_the_guest_s_bytes_are() -> None:
    assert users_of("ctypes") <= {"handles", "kvm", "memory", "coalesced", "hypervisor", "stats"}


def test_only_the_debug_server_knows_sockets() -> None:
    assert users_of("socket") <= {"debug", "connection"}


def test_ioctls_go_through_the_one_door() -> None:
    assert users_of("fcntl") <= {"disk"}  # whose requests are to a file system


def test_nothing_makes_processes() -> None:
    assert users_of("multiprocessing") | users_of("subprocess") == set()


def test_nothing_from_outside_the_standard_library_is_imported() -> None:
    import sys

    outside = {
        name
        for module in SOURCES
        for name in imports(module, lazy=False) | imports(module, lazy=True)
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "pyvmm"}
    }
    assert outside == {"pytest"}
    assert users_of("pytest") == {"testing"}


def test_nobody_inside_imports_what_is_for_the_tests_of_kernels() -> None:
    users = {
        module
        for module in SOURCES
        if "testing" in ours(imports(module, lazy=False) | imports(module, lazy=True))
    }
    assert users == set()


def test_signal_handlers_are_installed_only_by_the_command_line() -> None:
    installers = {
        module
        for module, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("signal", "sigaction", "set_wakeup_fd", "setitimer", "alarm")
        and isinstance(node.value, ast.Name)
        and node.value.id == "signal"
    }
    assert installers <= {"cli"}


def test_every_module_says_what_it_is_for() -> None:
    silent = [module for module, tree in SOURCES.items() if not ast.get_docstring(tree)]
    assert silent == []


def test_no_class_relies_on_being_collected() -> None:
    finalizers = [
        module
        for module, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__del__"
    ]
    assert finalizers == []
