"""The documentation is true where a machine can tell: commands are covered, links lead somewhere, promises have their test.

What a person is told to type is either run by a test or stands in COVERED with the place that runs it.
"""

from __future__ import annotations

import ast
import errno
import re
from pathlib import Path

import pytest

from valohai_fuse.cli.main import VERBS
from valohai_fuse.settings import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = re.compile(r"^```(?:sh|console|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")

COVERED = {
    "./scripts/demo": "is ./scripts/setup and `valohai-fuse demo`, a verb",
    "./scripts/test": "is what CI runs",
    "./scripts/check": "is run by ./scripts/test",
    "scripts/bench": "has tests of its own: tests/unit/test_bench*.py",
    "scripts/simulate": "is run by tests/unit/test_simulate.py, as it stands",
    "docker": "the Dockerfile is tried by ./scripts/test-image",
    "apt-get": "run by ./scripts/setup and ./scripts/test-image",
}
"""First words of commands, and why they may stand in the documentation."""


def commands(page: str) -> list[str]:
    """Every command of a page's shell blocks; of a console block only what follows the prompt."""
    found = []
    for block in SHELL.findall(page):
        lines = [line for line in block.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        prompted = [line[2:] for line in lines if line.startswith(("$ ", "# "))]
        found += prompted or lines
    return found


def is_covered(command: str) -> bool:
    """Whether something runs this, or it is one of our verbs with flags that exist."""
    words = command.split()
    if any(command.startswith(known) for known in COVERED):
        return True
    if words[0] == "valohai-fuse" and len(words) > 1:
        return words[1] in VERBS or words[1].startswith("-")
    return False


def anchors(page: str) -> set[str]:
    """The anchors that a page's headings make, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def all_tests() -> set[str]:
    """The names of all test functions of this repository."""
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_person_is_told_to_type_is_run_by_something(page: Path) -> None:
    """No command in the documentation that nobody has tried."""
    unknown = [command for command in commands(page.read_text(encoding="utf-8")) if not is_covered(command)]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that exists, and its anchor a heading of it."""
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if name.startswith(("http://", "https://")):
            continue
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


OWN_WORDS = [page for page in PAGES if page.name != "benchmarks.md"]
"""benchmarks.md is generated, by `scripts/bench --write`, and quotes the command lines of other programs."""


@pytest.mark.parametrize("page", OWN_WORDS, ids=lambda page: page.name)
def test_every_flag_that_is_mentioned_exists(page: Path) -> None:
    """A flag of ours in the documentation is a flag in the code: in the table of settings or in a verb's source."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    known = (
        {option.flag for option in OPTIONS} | set(re.findall(r'"(--[a-z][a-z-]+)', source)) | {"--help", "--version"}
    )
    others = {"--device", "--cap-add", "--security-opt", "--from"}  # docker's
    files = [*(ROOT / "scripts").iterdir(), *(ROOT / "benchmarks").glob("*.py")]
    scripts = "".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
    assert not {flag for flag in mentioned - known - others if flag not in scripts}


def test_every_setting_is_documented() -> None:
    """Each option stands on the reference page with its flag and its variable."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    missing = [option.name for option in OPTIONS if f"`{option.flag}" not in page or option.env not in page]
    assert not missing


def test_every_promise_names_tests_that_exist() -> None:
    """Each paragraph of docs/semantics.md that promises something ends with the names of the tests that hold it."""
    page = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 10
    assert not named - all_tests()
    promising = page.partition("## The tree\n")[2].partition("## What a program is told\n")[0]
    promises = [text for text in re.split(r"\n\s*\n", promising) if not text.startswith("## ")]
    assert not [promise for promise in promises if promise.strip() and "`test_" not in promise]


def test_every_errno_that_is_promised_is_tested_by_name() -> None:
    """An errno in the table of docs/semantics.md is looked for, as `errno.NAME`, by a test of the mount."""
    page = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
    table = page.partition("| what happened |")[2]
    promised = {word for word in re.findall(r"\bE[A-Z]+\b", table) if hasattr(errno, word)} - {"ENOTCONN"}
    assert {"ENOENT", "EROFS", "EACCES", "ESTALE", "ETIMEDOUT", "EIO"} <= promised
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "mount").glob("test_*.py"))
    assert not {name for name in promised if f"errno.{name}" not in tests}


def test_every_verb_is_in_the_readme() -> None:
    """Every verb of the command line stands in the README's table."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [verb for verb in VERBS if f"`valohai-fuse {verb}" not in page]


def test_these_tests_can_fail() -> None:
    """The readers above see what they are there for."""
    assert commands("```sh\n# a comment\nrm -rf /\n```\n") == ["rm -rf /"]
    assert commands("```console\n$ valohai-fuse mount\nmounted\n```\n") == ["valohai-fuse mount"]
    assert not is_covered("rm -rf /")
    assert not is_covered("valohai-fuse frobnicate")
    assert is_covered("valohai-fuse mount train")
    assert anchors("## Where things are, by `name`\n") == {"where-things-are-by-name"}
    assert LINK.findall("[how](docs/operating.md#privileges)") == ["docs/operating.md#privileges"]
