"""Every measured figure in README and docs stands in a results file that its page links to.

A figure is a number with decimals or a unit, or in a row of a table, outside code and links. `NOT_MEASURED` lists what
is no measurement: a setting, a version, a size of a model, a figure of a paper.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
NOT_MEASURED = {
    "docs/cli.md": (  # exit codes, lengths, thresholds
        *("0", "1", "2", "3", "8", "16", "50", "100", "128", "130", "2,048", "3%", "90%"),
    ),
    "docs/closed-form-editing.md": ("0.2", "2023", "2024", "538 MB", "2602.02543", "2605.00358"),
    "docs/coming-from.md": ("128", "256", "100,000"),  # settings
    "docs/compose.md": ("1,000,000",),
    "docs/demo.md": ("7860",),  # a port
    "docs/memory-slots.md": ("3.3 times", "0.999"),  # of the paper; a setting
    "docs/quickstart.md": ("3.10",),  # of Python
    "docs/reliability.md": ("5.24",),  # a version
    "docs/residual-memory.md": ("0.05", "30", "538 MB"),
    "docs/troubleshooting.md": ("0.25", "0.7", "0.8", "1", "2", "7", "8", "10", "16"),  # within messages
}
UNIT = r"%|s|ms|µs|seconds|minutes|hours|kB|MB|GB|times|tokens/s"
FIGURE = re.compile(rf"(?<![\w.,–-])(\d[\d,]*\d|\d)?(\.\d+)?(e-?\d+)?(?:\s?({UNIT})(?!\w))?(?![\w]|\.\d)")
SCALES = {"%": (100,), "ms": (1e3,), "µs": (1e6,), "kB": (1e-3,), "MB": (1e-6,), "GB": (1e-9, 1e-3)}
SCALES |= {"minutes": (1 / 60,), "hours": (1 / 3600, 1 / 60)}


def prose(page: str) -> str:
    """The page without code, comments and the targets of links."""
    for pattern in (r"<!--.*?-->", r"```.*?```", r"`[^`]*`", r"(?<=\])\([^)]*\)"):
        page = re.sub(pattern, " ", page, flags=re.DOTALL)
    return page


def figures(page: str) -> Iterator[tuple[str, float, float, str]]:
    """Text, value, half a unit of the last digit, and unit of every figure of a page."""
    for line in prose(page).splitlines():
        for match in FIGURE.finditer(line):
            whole, decimals, exponent, unit = (group or "" for group in match.groups())
            if not whole + decimals or not (decimals or unit or line.startswith("|")):
                continue
            value = float((whole.replace(",", "") or "0") + decimals + exponent)
            half = 0.5 * 10.0 ** (int(exponent[1:] or 0) - max(0, len(decimals) - 1))
            yield match.group().strip(), value, half * 1.001, unit


def numbers(value: Any) -> Iterator[float]:
    """All numbers of a JSON value, also those within its texts."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from numbers(name)
            yield from numbers(part)
    elif isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, str):
        for found in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?|\.\d+", value):
            yield float(found.replace(",", ""))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield abs(float(value))


def sources(page: str) -> list[float]:
    """All numbers of the results files that a page links to."""
    names = sorted(set(re.findall(r"results/([\w-]+\.(?:json|md))", page)))
    texts = [(RESULTS / name).read_text(encoding="utf-8") for name in names]
    return [x for name, text in zip(names, texts, strict=True) for x in numbers(_parsed(name, text))]


def _parsed(name: str, text: str) -> Any:
    return json.loads(text) if name.endswith(".json") else text


def untraced(page: str) -> list[str]:
    """The figures of a page that are not in its sources."""
    known = sources(page)
    return [text for text, value, half, unit in figures(page) if not _stands(known, value, half, unit)]


def _stands(known: list[float], value: float, half: float, unit: str) -> bool:
    changes = [abs(x - 1) * 100 for x in known] if unit == "%" else []
    scaled = [x * scale for x in known for scale in (1, *SCALES.get(unit, ()))]
    return any(abs(x - value) <= half for x in scaled + changes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_figure_stands_in_a_results_file(page):
    content = page.read_text(encoding="utf-8")
    left, allowed = untraced(content), NOT_MEASURED.get(str(page.relative_to(ROOT)), ())
    assert not sorted(set(left) - set(allowed)), "no results file that the page links to has these"
    assert not sorted(set(allowed) - {text for text, *_ in figures(content)}), "listed as not measured, but not there"


def test_every_page_with_exceptions_exists():
    assert set(NOT_MEASURED) <= {str(page.relative_to(ROOT)) for page in PAGES}


def test_the_index_of_results_says_how_they_were_made():
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in index.splitlines() if line.startswith("| ")]
    listed = {name: row for row in rows[1:] for name in row[0].split(", ")}
    assert {*listed, "README.md"} == {file.name for file in RESULTS.iterdir()}
    for name, (_, command, _, seed, date) in listed.items():
        assert command.startswith(("`python ", "`make ", "none: ")), name
        assert re.fullmatch(r"\d(, \d)*", seed), name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date), name
        for script in re.findall(r"(?:benchmarks|examples)/\w+\.py", command):
            assert (ROOT / script).is_file(), script


def test_a_figure_is_found_and_rounded_as_it_is_shown():
    page = "Exact 0.98 (.8 before), +6.0%, 12 s, `0.5`, 3 blocks, [1.5](x/9.9), 127.0.0.1\n| 1,234 | 2e-5 |"
    assert [text for text, *_ in figures(page)] == ["0.98", ".8", "6.0%", "12 s", "1.5", "1,234", "2e-5"]
    known = [0.9821, 0.76, 1.0603, 12.4, 1.46, 1234.0, 1.9e-5]
    assert all(_stands(known, *parts) for _, *parts in figures(page))
    assert not _stands(known, 0.97, 0.005, "")
    assert not _stands(known, 5.9, 0.05, "%")
