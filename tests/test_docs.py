"""What the pages tell people to type exists: commands, options, modules, make targets, files, links."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from converters.cli import build_app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = "vllm-sparse "
# Folders may be made by a command; files with an ending are ours.
FILE = re.compile(r"`((?:bench|converters|deploy|docs|tests|vllm_sparse)/[\w./-]+\.\w+)`")
# Words that stand for something to be filled in.
PLACEHOLDER = re.compile(r"\.\.\.|…|\||^$")


def commands(page: Path) -> list[str]:
    """Lines of code blocks without a language, and inline code; continued lines joined, comments dropped."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, re.DOTALL)
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines() + re.findall(r"`([^`\n]+)`", outside)
    return [re.split(r"\s#\s|\s{3,}", line.strip())[0] for line in lines]


def parts(line: str) -> list[str]:
    """A line's single commands, without variables set before them."""
    return [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", part.strip()) for part in re.split(r"&&|;", line)]


def of_program(page: Path, program: str) -> list[list[str]]:
    found = [part for line in commands(page) for part in parts(line) if part.startswith(program)]
    return [shlex.split(part) for part in found if not PLACEHOLDER.search(part)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_that_are_named_exist(page: Path) -> None:
    """In inline code, where no link shows that a page is gone."""
    for name in re.findall(r"`(\w[\w-]*\.md)`", page.read_text(encoding="utf-8")):
        assert any((folder / name).is_file() for folder in (page.parent, ROOT, ROOT / "docs")), name


@pytest.fixture(scope="module")
def root_command() -> object:
    return typer.main.get_command(build_app())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_are_accepted(page: Path, root_command: object) -> None:
    """Parsed as on the command line, not run."""
    for words in of_program(page, PROGRAM):
        command, arguments, path = root_command, words[1:], "vllm-sparse"
        while hasattr(command, "commands") and arguments:
            name = arguments.pop(0)
            assert name in command.commands, f"{page.name}: {shlex.join(words)}: no command {name!r}"
            command, path = command.commands[name], f"{path} {name}"
        # Inline code often names a command alone; what it requires is then not its point.
        if len(arguments) > 1:
            context = command.make_context(path, arguments)
            assert context.params


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_targets_and_files_are_there(page: Path) -> None:
    for words in [*of_program(page, "python -m "), *of_program(page, "torchrun ")]:
        module = words[words.index("-m") + 1]
        assert importlib.util.find_spec(module), f"{page.name}: {shlex.join(words)}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in of_program(page, "make "):
        assert words[1] in targets, f"{page.name}: {shlex.join(words)}"
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    for path in re.findall(FILE, page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_something_is_looked_at() -> None:
    found = [words for page in PAGES for words in of_program(page, PROGRAM)]
    assert len(found) > 30
    assert ["bench", "sweep"] in [words[1:3] for words in found]


@pytest.mark.parametrize(
    "line", ["vllm-sparse convert A B --two dense", "vllm-sparse bench run --base-url http://h --seed x"]
)
def test_a_wrong_line_is_found(line: str, root_command: object, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```\n{line}\n```\n")
    with pytest.raises(Exception, match=r"--two|valid integer"):
        test_options_are_accepted(page, root_command)
