"""Write the file tree of README.md: one line per file, taken from the file itself.

python scripts/readme_tree.py           rewrite it
python scripts/readme_tree.py --check   exit 1 if it is out of date
"""

from __future__ import annotations

import ast
import subprocess  # nosec B404 - git ls-files
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- tree: scripts/readme_tree.py -->\n", "<!-- end of tree -->"
# files that say nothing of themselves
KNOWN = {
    ".ci/run": "what CI runs: the test command and the checks",
    "LICENSE": "Apache-2.0",
    "Makefile": "test, test-full, test-oldest, check, bench",
    "pyproject.toml": "settings of ruff, mypy, pytest, import-linter, bandit",
}
HIDDEN = ("__init__.py", "conftest.py", ".gitignore", "py.typed")
DATA = ("tests/data/", "tests/golden/")


def tree() -> str:
    """The fenced tree of all tracked files; data of the tests by folder."""
    listed = subprocess.run(  # nosec B603 B607 - fixed arguments
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    lines, folder = [], None
    for name in sorted(set(listed), key=lambda name: (Path(name).parent.parts, name)):
        path = Path(name)
        if path.name in HIDDEN or name.startswith(DATA) or not (ROOT / path).is_file():
            continue
        if path.parent != folder:
            folder = path.parent
            lines.append(f"{folder}/" if folder.parts else "./")
        lines.append(f"  {path.name:<27} {describe(path)}".rstrip())
    lines += ["tests/data/, tests/golden/", "  goldens of the original, and resolved configurations"]
    return "```\n" + "\n".join(lines) + "\n```\n"


def describe(path: Path) -> str:
    """The first sentence that a file says of itself."""
    if str(path) in KNOWN:
        return KNOWN[str(path)]
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
    elif path.suffix == ".sh":
        first = next((line[2:] for line in text.splitlines()[1:] if line.startswith("# ")), "")
    else:
        first = text.splitlines()[0].lstrip("# ")
    return first.rstrip(".")


def main(argv: list[str]) -> int:
    """Rewrite or check; returns the exit code."""
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    head, rest = before.split(START)
    after = head + START + tree() + END + rest.split(END)[1]
    if argv == ["--check"]:
        if after != before:
            print("README.md: its tree is out of date; run python scripts/readme_tree.py", file=sys.stderr)
        return int(after != before)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
