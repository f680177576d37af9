"""docs/architecture.md and CONTRIBUTING.md describe the tree as it is."""

import re
from pathlib import Path

import pytest
from import_graph import PACKAGES, ROOT
from test_imports import ROOMS

PAGE = ROOT / "docs" / "architecture.md"
TEXT = PAGE.read_text()


def test_every_room_is_described_once() -> None:
    rooms = re.findall(r"^\| `([\w/]+/)` \|", TEXT, re.MULTILINE)
    folders = [path.parent for p in PACKAGES for path in (ROOT / p).rglob("__init__.py")]
    names = {f"{folder.relative_to(ROOT)}/" for folder in folders}
    # The pipeline and the trainer consist of their rooms.
    assert sorted(rooms) == sorted(names - {"pipeline/", "trainer/"})


def test_diagram_shows_the_laws_of_import() -> None:
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", TEXT, re.DOTALL)
    for package, body in re.findall(r"subgraph (\w+)\n(.*?)\n    end", diagram, re.DOTALL):
        arrows = re.findall(r"([\w.]+) --> ([\w.]+)", body)
        shown = {tuple(name.removeprefix(f"{package}.") for name in arrow) for arrow in arrows}
        assert shown == {(room, low) for room, lower in ROOMS[package].items() for low in lower}
    assert re.findall(r"subgraph (\w+)", diagram) == list(ROOMS)


@pytest.mark.parametrize("page", [PAGE, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    named = set(re.findall(r"`([\w.-]+/[\w./-]*)`", page.read_text()))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
