"""The law of the house: imports run downwards only; and the door opens at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import remanence

ROOT = Path(remanence.__file__).parent
FLOORS = [
    {"errors", "state", "catalogue", "stopping"},
    {"ops"},
    {"memory"},
    {"models"},
    {"continual", "optim"},
    {"learning"},
    {"streams"},
    {"evaluation"},
    {"api", "watching"},
    {"cli", "__main__"},
]
# proofs are shown to the catalogue by name, and registered by modules that it loads when asked
GROUND = FLOORS[0]


def floor(room):
    for height, rooms in enumerate(FLOORS):
        if room in rooms:
            return height
    raise AssertionError(f"{room} has no floor: add it to FLOORS.")


def imported(source, path):
    """The rooms of the house that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {n.name for n in node.names if n.name.startswith("remanence")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name the package, so that they can be read alone"
            module = node.module or ""
            if module == "remanence":
                found |= {f"remanence.{n.name}" for n in node.names}
            elif module.startswith("remanence."):
                found.add(module)
    return {name.split(".")[1] for name in found if "." in name} - {"__version__"}


def violations(source, room, path="?"):
    return [f"{path}: {room} imports {other}" for other in imported(source, path) if floor(other) > floor(room)]


def test_imports_run_downwards():
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        if room != "__init__":
            found += violations(path.read_text(encoding="utf-8"), room, path.relative_to(ROOT))
    assert not found


@pytest.mark.parametrize(
    "upwards",
    ["from remanence.api import learn", "import remanence.cli", "def f():\n    from remanence import evaluation"],
)
def test_an_import_upwards_is_seen(upwards):
    assert violations(upwards, "ops")
    assert not violations(upwards, "cli")


def test_ops_know_nothing_of_neural_layers():
    for path in (ROOT / "ops").glob("*.py"):
        assert imported(path.read_text(encoding="utf-8"), path) <= {"ops", "errors", "state"}, path


def test_the_package_and_the_help_open_without_torch():
    asked = (
        "import sys, remanence; assert 'torch' not in sys.modules; assert remanence.__version__;"
        "assert not [m for m in sys.modules if m.startswith('remanence.')]"
    )
    subprocess.run([sys.executable, "-c", asked], check=True, timeout=60)


def test_what_the_package_offers_is_there():
    for name in remanence.__all__:
        assert callable(getattr(remanence, name))
    with pytest.raises(AttributeError, match="no attribute 'learned'"):
        remanence.learned  # noqa: B018
