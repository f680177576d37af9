"""Which module of flsep imports which, read from the source.

``python tests/import_graph.py [FOLDER]`` prints the levels of import of each package in a checkout.

What counts as an import: ``import`` and ``from ... import`` anywhere in a file, and calls of
``importlib.import_module`` with a literal name. ``from package import module`` counts as an import
of the module. Python also runs the ``__init__.py`` of every parent package; that does not count.
A registry's strings ("module:Class") do not count either: they are looked up when they are used.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("cache", "pipeline", "trainer")
Kind = Literal["module", "function", "typing"]
Graph = dict[str, set[str]]


class Import(NamedTuple):
    """One import in the source; `kind` says when it runs."""

    file: str
    module: str
    kind: Kind

    @property
    def package(self) -> str:
        return self.file.partition("/")[0]

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]

    @property
    def importer(self) -> str:
        return name_module(Path(self.file))


def name_module(path: Path) -> str:
    """Return the full name of the module in a file, given relative to the checkout."""
    parts = path.with_suffix("").parts
    return ".".join(("flsep", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def find_imports(source: str, file: str) -> Iterator[Import]:
    """Yield the imports of a module."""
    tree = ast.parse(source)
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    in_functions = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        kind: Kind = "module"
        if node in typing_only:
            kind = "typing"
        elif node in in_functions:
            kind = "function"
        yield from (Import(file, module, kind) for module in _named_modules(node))


def _named_modules(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), level=0, names=names):
            # Whether a name is a module of flsep is decided when all modules are known.
            members = [f"{module}.{alias.name}" for alias in names]
            return members if module.partition(".")[0] == "flsep" else [module]
        case ast.ImportFrom(module=module, level=level):
            return [f"{'.' * level}{module or ''}"]
        case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
            if ast.unparse(function).endswith(("import_module", "__import__")):
                return [name]
    return []


def list_files(root: Path = ROOT) -> list[Path]:
    """Return the source files of all packages, relative to the checkout."""
    found = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    return sorted(path.relative_to(root) for path in found)


def read_imports(root: Path = ROOT) -> list[Import]:
    """Return the imports of all packages, each member of flsep resolved to its module."""
    files = list_files(root)
    modules = {name_module(path) for path in files}
    imports = []
    for path in files:
        for found in find_imports((root / path).read_text(encoding="utf-8"), path.as_posix()):
            module = found.module
            if found.root == "flsep" and module not in modules:
                module = module.rpartition(".")[0]
            imports.append(found._replace(module=module))
    return imports


def build_graph(imports: Iterable[Import]) -> Graph:
    """Return the modules of flsep that each module of flsep imports."""
    graph: Graph = {}
    for found in imports:
        targets = graph.setdefault(found.importer, set())
        if found.root == "flsep":
            targets.add(found.module)
    return graph


def find_cycle(graph: Graph) -> list[str]:
    """Return a chain of modules that import each other in a circle; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def find_longest_chain(graph: Graph, package: str) -> list[list[str]]:
    """Return the longest chain of imports inside a package; each level is one module or one cycle.

    Modules that import each other count as one level.
    """
    modules = [m for m in {*graph, *chain.from_iterable(graph.values())} if _is_inside(m, package)]
    reached = {module: _reach(graph, module, package) for module in modules}
    groups = {
        module: frozenset({module, *(other for other in below if module in reached[other])})
        for module, below in reached.items()
    }
    chains: dict[frozenset[str], list[list[str]]] = {}
    # A group reaches all that the groups below it reach, and more: the smallest come first.
    for group in sorted(set(groups.values()), key=lambda group: len(reached[min(group)] | group)):
        below = [chains[groups[module]] for module in reached[min(group)] - group]
        chains[group] = [sorted(group), *max(below, key=len, default=[])]
    return max(chains.values(), key=len)


def _is_inside(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"flsep.{package}.")


def _reach(graph: Graph, start: str, package: str) -> set[str]:
    """Return the modules of a package that a module imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), ()):
            if target not in found and _is_inside(target, package):
                found.add(target)
                waiting.append(target)
    return found


def print_levels(root: Path) -> None:
    """Print how many levels of import each package has, and a chain that makes them."""
    imports = read_imports(root)
    for title, kinds in (
        ("imports at module level", {"module"}),
        ("all imports: in functions and for typing, too", {"module", "function", "typing"}),
    ):
        print(title)
        graph = build_graph(found for found in imports if found.kind in kinds)
        for package in PACKAGES:
            levels = find_longest_chain(graph, package)
            names = (" = ".join(shorten(module) for module in level) for level in levels)
            print(f"  {package:9}{len(levels):2} levels: {' > '.join(names)}")


def shorten(module: str) -> str:
    """Return a module's name inside its package."""
    _, _, name = module.removeprefix("flsep.").partition(".")
    return name or "__init__"


if __name__ == "__main__":
    print_levels(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
