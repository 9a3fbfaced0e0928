"""The house rules, checked against the source tree itself."""

import ast
import http
import re
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "gptoss"
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 70
# The catalogues of events and commands are lists of declarations, read as documents.
CATALOGUES = {
    SRC / "messages" / "events.py": 1000,
    SRC / "messages" / "commands.py": 550,
    SRC / "engine" / "port.py": 450,
}
BANNED_WORDS = {"utils", "util", "helper", "helpers", "manager", "managers", "misc", "common"}


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    def span(statement: ast.stmt) -> int:
        assert statement.end_lineno is not None
        return statement.end_lineno - statement.lineno + 1

    return span(node) - (span(node.body[0]) if ast.get_docstring(node) else 0)


def _modules() -> list[Path]:
    found = sorted(SRC.rglob("*.py"))
    assert len(found) > 20  # a wrong path must not make the rules hold for nothing
    return found


def test_stdlib_http_is_not_shadowed() -> None:
    assert http.__file__ is not None
    assert http.__file__.startswith(sysconfig.get_path("stdlib"))


def test_no_init_under_tests() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_modules_and_functions_stay_small() -> None:
    too_big: list[str] = []
    for path in _modules():
        source = path.read_text(encoding="utf-8")
        if source.count("\n") > CATALOGUES.get(path, MAX_MODULE_LINES):
            too_big.append(f"{path}: {source.count(chr(10))} lines")
        too_big.extend(
            f"{path}:{node.lineno} {node.name}"
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _body_lines(node) > MAX_FUNCTION_LINES
        )
    assert not too_big, "\n".join(too_big)


def test_every_module_opens_with_its_rules() -> None:
    without = [str(path) for path in _modules() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not without, "\n".join(without)


def test_no_module_is_named_for_nothing_in_particular() -> None:
    assert not [str(path) for path in _modules() if BANNED_WORDS & set(path.stem.split("_"))]


def test_every_test_that_the_page_on_reliability_names_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 50
    defined = {file: _functions(ROOT / file) for file, _ in named if (ROOT / file).exists()}
    missing = [f"{file}::{name}" for file, name in named if name not in defined.get(file, ())]
    assert not missing, "\n".join(missing)
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.endswith(" | Test |")]
    unproven = [row for row in rows if "`tests/" not in row]
    assert not unproven, "\n".join(unproven)


def _functions(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)}
