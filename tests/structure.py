"""The structure of the source, measured: sizes, and imports between packages.

    python -m tests.structure [FOLDER]

Prints the numbers of the repository in FOLDER (by default this one), so that two commits can be
compared: `git worktree add FOLDER COMMIT`.
"""

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("foam_lightning", "tuner", "configs")


def source_files(root: Path) -> list[Path]:
    """List the Python files of the source, sorted."""
    found = [path for name in PACKAGES for path in (root / name).rglob("*.py")]
    return sorted([root / "cli.py", *found])


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _nodes(tree: ast.AST, *, with_type_checking: bool = True) -> Iterator[ast.AST]:
    yield tree
    for child in ast.iter_child_nodes(tree):
        if with_type_checking or not _is_type_checking(child):
            yield from _nodes(child, with_type_checking=with_type_checking)


def imports(path: Path, modules: set[str], *, with_type_checking: bool = True) -> set[str]:
    """Name every module that a file imports, inside functions too.

    Args:
        path: The file; imports in it are absolute.
        modules: The modules of the source, to tell `from package import module` from a name.
        with_type_checking: Count imports for type checkers alone.
    """
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _nodes(tree, with_type_checking=with_type_checking):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            source = node.module or ""
            submodules = {f"{source}.{alias.name}" for alias in node.names} & modules
            found |= submodules or {source}
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    """Map every module of the source to those of the source that it imports."""
    files = {module_name(path, root): path for path in source_files(root)}
    modules = set(files)
    return {name: imports(path, modules) & modules - {name} for name, path in files.items()}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """List the groups of two or more modules that import each other, over any number of steps."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for name in graph.get(stack.pop(), set()) - seen:
                seen.add(name)
                stack.append(name)
        return seen

    reach = {name: reachable(name) for name in graph}
    groups = {
        tuple(sorted(other for other in graph if other in reach[name] and name in reach[other]))
        for name in graph
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def package_of(module: str) -> str:
    """Name the room of a module: its package, or itself at the top of `foam_lightning`, `tuner`."""
    return ".".join(module.split(".")[:2])


def _function_lengths(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, f"{path.name}:{node.name}"


def report(root: Path) -> str:
    """Describe the structure of a repository, one number a line."""
    files = source_files(root)
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    longest = max(files, key=lambda path: lengths[path])
    function = max(found for path in files for found in _function_lengths(path))
    graph = import_graph(root)
    rooms = {package_of(name) for name in graph}
    arrows = {
        (package_of(name), package_of(other))
        for name, others in graph.items()
        for other in others
        if package_of(name) != package_of(other)
    }
    rooms_of = {
        package: sorted(room for room in rooms if room.startswith(f"{package}."))
        for package in PACKAGES[:2]
    }
    tests = sorted((root / "tests").rglob("*.py"))
    lines = [
        f"source: {len(files)} files, {sum(lengths.values())} lines, "
        f"median {statistics.median(lengths.values()):g}",
        f"longest file: {longest.relative_to(root)}, {lengths[longest]} lines",
        f"longest function: {function[1]}, {function[0]} lines",
        *(f"top of {name}: {len(found)} entries" for name, found in rooms_of.items()),
        f"import arrows between them: {len(arrows)}",
        f"circles of modules: {len(cycles(graph))}",
        f"tests: {len(tests)} files, "
        f"{sum(len(p.read_text(encoding='utf-8').splitlines()) for p in tests)} lines",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent)))
