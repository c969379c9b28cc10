"""FEVER's claims by evidence page: loaders, the choice of pages, and each page's claims to train on and to judge.

A page is known by its title as Wikipedia writes it; FEVER's file names (`Soul_Food_-LRB-film-RRB-`) are undone.
"""

from __future__ import annotations

import json
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LABELS", "Claim", "FeverData", "Page", "group_by_page", "load_claims", "load_pages", "page_title"]

LABELS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
_ESCAPES = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-COLON-": ":"}


@dataclass(frozen=True)
class Claim:
    """Store a sentence that evidence supports, refutes, or says nothing of.

    Attributes:
        text: The claim.
        label: One of `LABELS`.
        pages: Titles of the pages with its evidence; none for NOT ENOUGH INFO.
    """

    text: str
    label: str
    pages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """Store a page with the claims about it.

    Attributes:
        title: Its title.
        text: What it says.
        training: Claims to learn from and to show as solved examples.
        validation: Claims to judge.
    """

    title: str
    text: str
    training: tuple[Claim, ...]
    validation: tuple[Claim, ...]


@dataclass(frozen=True)
class FeverData:
    """Store what an experiment runs on.

    Attributes:
        pages: In falling order of their number of claims.
        fill: Claims that are judged nowhere and belong to none of the pages: shots where a page has too few of a label.
        n_full: Pages that claims name as evidence.
        n_top: Pages of these that were looked at, from the one with most claims down.
        n_trunc: Pages that were left: those with a text, a claim to train on and a claim to judge.
    """

    pages: tuple[Page, ...]
    fill: tuple[Claim, ...]
    n_full: int
    n_top: int
    n_trunc: int

    @property
    def label_counts(self) -> dict[str, int]:
        """How many of the claims to judge have each label."""
        counts = Counter(claim.label for page in self.pages for claim in page.validation)
        return {label: counts[label] for label in LABELS}


def page_title(name: str) -> str:
    """Return a page's title from FEVER's name for it; a title stays as it is."""
    for escaped, character in _ESCAPES.items():
        name = name.replace(escaped, character)
    return unicodedata.normalize("NFC", name.replace("_", " ")).strip()


def load_claims(path: str | os.PathLike[str]) -> list[Claim]:
    """Read claims from a JSON array or JSON lines.

    A row is one of FEVER's own (`claim`, `label`, `evidence`: sets of [annotation, evidence, page, sentence]), of
    KILT's (`input`, `output`: [{`answer`, `provenance`: [{`title`}]}]), or flat (`claim`, `label`, `evidence_pages`).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row fits none of these; it is named.
    """
    claims = []
    for number, row in _rows(Path(path)):
        try:
            claims.append(_claim(row))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"`{path}`, row {number}: no claim of FEVER's, KILT's or the flat form ({type(error).__name__}: "
                f"{error}). Correct or remove the row."
            ) from None
        if claims[-1].label not in LABELS:
            raise ValueError(f"`{path}`, row {number}: the label {claims[-1].label!r} must be one of {LABELS}.")
    return claims


def _claim(row: Mapping[str, Any]) -> Claim:
    if "input" in row:
        outputs = row["output"]
        names = [place["title"] for output in outputs for place in output.get("provenance") or ()]
        answers = [output["answer"] for output in outputs if "answer" in output]
        return Claim(row["input"], answers[0], _titles(names))
    if "evidence_pages" in row:
        return Claim(row["claim"], row["label"], _titles(row["evidence_pages"]))
    sentences = [sentence for group in row["evidence"] for sentence in group]
    return Claim(row["claim"], row["label"], _titles(sentence[2] for sentence in sentences if sentence[2]))


def _titles(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(page_title(name) for name in names))


def load_pages(path: str | os.PathLike[str], titles: Iterable[str] | None = None) -> dict[str, str]:
    """Read the texts of pages from a file of JSON lines, or from all `*.jsonl` files of a folder.

    A row is one of FEVER's dump (`id`, `text`), of KILT's knowledge source (`wikipedia_title`, `text`: paragraphs, of
    which those before the first section are taken), or flat (`page`, `text`). Files are streamed.

    Args:
        path: A file, or a folder such as FEVER's `wiki-pages`.
        titles: Keep these alone; None for all.

    Returns:
        Title to text.

    Raises:
        FileNotFoundError: If there is no such file, or no `*.jsonl` in the folder.
        ValueError: If a row fits none of these; it is named.
    """
    source = Path(path)
    files = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
    if not files:
        raise FileNotFoundError(f"`{path}` has no *.jsonl files: give FEVER's wiki-pages, or a file of pages.")
    wanted = None if titles is None else set(titles)
    texts: dict[str, str] = {}
    for file in files:
        for number, row in _rows(file):
            name = next((row[key] for key in ("page", "wikipedia_title", "id") if isinstance(row.get(key), str)), None)
            if name is None or "text" not in row:
                raise ValueError(f"`{file}`, row {number}: a page needs a name and a text, got {', '.join(row)}.")
            title = page_title(name)
            if title and (wanted is None or title in wanted):
                texts[title] = _page_text(row["text"])
    return texts


def _page_text(text: str | Sequence[str]) -> str:
    if isinstance(text, str):
        for escaped, character in _ESCAPES.items():
            text = text.replace(escaped, character)
        return text.strip()
    first = next((i for i, part in enumerate(text) if part.startswith("Section::::")), len(text))
    return "\n".join(part.strip() for part in text[1:first] if part.strip())  # the first paragraph is the title


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a JSON array or of JSON lines, counted from 1."""
    if not file.is_file():
        raise FileNotFoundError(f"`{file}` is no file: give the path of FEVER's claims or pages.")
    with open(file, encoding="utf-8") as stream:
        start = stream.read(1)
        stream.seek(0)
        lines: Iterable[Any] = json.load(stream) if start == "[" else (line for line in stream if line.strip())
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if isinstance(line, str) else line
            except ValueError as error:
                raise ValueError(f"`{file}`, row {number} is no JSON ({error}). Correct or remove the row.") from None
            if not isinstance(row, Mapping):
                raise ValueError(f"`{file}`, row {number} must be an object, got {row!r}.")
            yield number, row


def group_by_page(
    claims: Sequence[Claim],
    texts: Mapping[str, str],
    *,
    num_pages: int | None = None,
    top: int | None = None,
    training_claims: Sequence[Claim] | None = None,
    training_share: float = 0.5,
    seed: int = 0,
) -> FeverData:
    """Choose the pages with most claims, and split each page's claims into those to train on and those to judge.

    Pages are ranked by their number of claims, those of equal number by title. Pages without a text, a claim to train
    on or one to judge are dropped. A claim with evidence on several pages belongs to the highest of them, so that none
    is both learned and judged.

    Args:
        claims: The claims, FEVER's validation set for instance.
        texts: Title to text.
        num_pages: Go down the ranking until so many pages are kept; None for no limit.
        top: Look at so many pages of the ranking (the experiment's N); None for no limit.
        training_claims: Claims to train on from another file; `claims` are then all judged. None to split `claims`.
        training_share: Share of a page's claims, label by label, to train on.
        seed: Of the split.

    Raises:
        ValueError: If a number is out of range, or no page is left.
    """
    for name, value in (("num_pages", num_pages), ("top", top)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not 0 < training_share < 1:
        raise ValueError(f"`training_share` must be above 0 and below 1, got {training_share}.")
    counts = Counter(title for claim in claims for title in claim.pages)
    ranking = sorted(counts, key=lambda title: (-counts[title], title))
    rank = {title: i for i, title in enumerate(ranking)}

    def by_page(every: Sequence[Claim]) -> dict[str, list[Claim]]:
        found: dict[str, list[Claim]] = {}
        for claim in every:
            known = [title for title in claim.pages if title in rank]
            if known:
                found.setdefault(min(known, key=lambda title: rank[title]), []).append(claim)
        return found

    judged, taught = by_page(claims), by_page(training_claims or ())
    kept: list[Page] = []
    looked_at = 0
    for title in ranking[:top]:
        if num_pages is not None and len(kept) == num_pages:
            break
        looked_at += 1
        own = judged.get(title, [])
        if training_claims is None:
            training, validation = _split(own, training_share, f"{seed} {title}")
        else:
            training, validation = taught.get(title, []), own
        if texts.get(title) and training and validation:
            kept.append(Page(title, texts[title], tuple(training), tuple(validation)))
    if not kept:
        raise ValueError(f"None of the {looked_at} pages looked at has a text, a claim to train on and one to judge.")
    used = {claim for page in kept for claim in (*page.training, *page.validation)}
    source = claims if training_claims is None else training_claims
    fill = tuple(claim for claim in source if claim not in used)
    return FeverData(tuple(kept), fill, len(ranking), looked_at, len(kept))


def _split(claims: Sequence[Claim], share: float, seed: str) -> tuple[list[Claim], list[Claim]]:
    """Claims to train on and to judge, label by label; what is odd goes to one side and the other in turns."""
    rng = random.Random(seed)
    training: list[Claim] = []
    validation: list[Claim] = []
    carried = 0.0
    for label in LABELS:
        group = [claim for claim in claims if claim.label == label]
        rng.shuffle(group)
        wanted = len(group) * share + carried
        count = round(wanted)
        carried = wanted - count
        training += group[:count]
        validation += group[count:]
    return training, validation
