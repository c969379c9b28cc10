"""FEVER's claims and pages: every file format, the choice of pages, the split, and the prompt."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from examples.fever.data import (
    LABELS,
    Claim,
    FeverData,
    Page,
    group_by_page,
    load_claims,
    load_pages,
    page_title,
)
from examples.fever.prompts import (
    choose_shots,
    claim_as_fact,
    documents,
    facts,
    few_shot_prompt,
    solved_claims,
)
from memory_adapters import Fact

YES, NO, UNKNOWN = LABELS
FILM = "Soul Food (film)"


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_three_forms_of_claims_are_read_alike(tmp_path: Path) -> None:
    own = [
        {"id": 1, "claim": "It rains.", "label": NO, "evidence": [[[9, 8, "Soul_Food_-LRB-film-RRB-", 0]]]},
        {"id": 2, "claim": "It snows.", "label": UNKNOWN, "evidence": [[[9, None, None, None]]]},
    ]
    flat = [
        {"claim": "It rains.", "label": NO, "evidence_pages": ["Soul_Food_-LRB-film-RRB-"]},
        {"claim": "It snows.", "label": UNKNOWN, "evidence_pages": []},
    ]
    kilt = [{"input": "It rains.", "output": [{"answer": NO, "provenance": [{"title": FILM}, {"title": FILM}]}]}]
    expected = [Claim("It rains.", NO, (FILM,)), Claim("It snows.", UNKNOWN)]
    assert load_claims(lines(tmp_path / "fever.jsonl", own)) == expected
    assert load_claims(lines(tmp_path / "flat.jsonl", flat)) == expected
    assert load_claims(lines(tmp_path / "kilt.jsonl", kilt)) == expected[:1]
    (tmp_path / "array.json").write_text(json.dumps(flat))
    assert load_claims(tmp_path / "array.json") == expected


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"claim": "x", "label": "MAYBE", "evidence_pages": []}, "'MAYBE' must be one of"),
        ({"claim": "x", "label": YES}, "no claim of FEVER's"),
        ({"input": "x", "output": []}, "no claim of FEVER's"),
        ({"claim": "x", "label": YES, "evidence": [[["short"]]]}, "no claim of FEVER's"),
        (["x"], "must be an object"),
    ],
)
def test_a_claim_that_does_not_fit_is_named(tmp_path: Path, row: Any, why: str) -> None:
    good = {"claim": "x", "label": YES, "evidence_pages": []}
    with pytest.raises(ValueError, match=f"row 2.*{why}"):
        load_claims(lines(tmp_path / "claims.jsonl", [good, row]))


def test_the_forms_of_pages_are_read_alike(tmp_path: Path) -> None:
    dump = tmp_path / "wiki-pages"
    dump.mkdir()
    lines(dump / "wiki-001.jsonl", [{"id": "", "text": "", "lines": ""}])
    lines(dump / "wiki-002.jsonl", [{"id": "Soul_Food_-LRB-film-RRB-", "text": "A film -LRB- 1997 -RRB- ."}])
    kilt = {
        "wikipedia_title": FILM,
        "text": ["Soul Food (film)\n", "A film.\n", "Of 1997.\n", "Section::::Plot.\n", "x"],
    }
    assert load_pages(dump) == {FILM: "A film ( 1997 ) ."}
    assert load_pages(lines(tmp_path / "kilt.jsonl", [kilt])) == {FILM: "A film.\nOf 1997."}
    flat = [{"page": "Soul_Food_-LRB-film-RRB-", "title": FILM, "text": "A film."}, {"page": "Rome", "text": "A city."}]
    assert load_pages(lines(tmp_path / "flat.jsonl", flat)) == {FILM: "A film.", "Rome": "A city."}
    assert load_pages(tmp_path / "flat.jsonl", ["Rome", "Paris"]) == {"Rome": "A city."}
    with pytest.raises(ValueError, match="row 1: a page needs a name and a text, got text"):
        load_pages(lines(tmp_path / "none.jsonl", [{"text": "x"}]))
    with pytest.raises(FileNotFoundError, match="is no file"):
        load_pages(tmp_path / "wiki-pages" / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="wiki-pages"):
        load_pages(tmp_path / "empty")


def test_titles_of_either_spelling_are_one() -> None:
    assert page_title("Soul_Food_-LRB-film-RRB-") == page_title(FILM) == FILM
    assert page_title("Star_Trek-COLON-_Picard") == "Star Trek: Picard"
    assert page_title("Beyonce\u0301") == "Beyoncé"


def claims() -> list[Claim]:
    many = [Claim(f"A {i}", (YES, NO)[i % 2], ("A",)) for i in range(9)]
    some = [Claim(f"B {i}", YES, ("B",)) for i in range(5)] + [Claim("B and A", NO, ("B", "A"))]
    return [*many, *some, Claim("C", YES, ("C",)), *(Claim(f"unknown {i}", UNKNOWN) for i in range(4))]


def test_pages_are_ranked_dropped_and_counted() -> None:
    data = group_by_page(claims(), {"A": "about A", "B": "about B", "C": "about C"})
    assert [page.title for page in data.pages] == ["A", "B"], "C has one claim: nothing is left to judge or to learn"
    assert (data.n_full, data.n_top, data.n_trunc) == (3, 3, 2)
    assert group_by_page(claims(), {"A": "a", "B": ""}).n_trunc == 1
    assert group_by_page(claims(), {"A": "a", "B": "b"}, top=1).n_top == 1
    first = group_by_page(claims(), {"B": "b", "A": "a"}, num_pages=1)
    assert [page.title for page in first.pages] == ["A"]
    assert first.n_top == 1
    second = group_by_page(claims(), {"B": "b"}, num_pages=1)
    assert (second.n_top, second.pages[0].title) == (2, "B")
    for wrong in ({"top": 0}, {"num_pages": 0}, {"training_share": 1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
            group_by_page(claims(), {"A": "a"}, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="None of the 3 pages"):
        group_by_page(claims(), {})


def test_every_claim_is_on_one_side_of_one_page() -> None:
    for seed in range(5):
        data = group_by_page(claims(), {"A": "a", "B": "b"}, seed=seed)
        sides = [claim for page in data.pages for claim in (*page.training, *page.validation)]
        assert Counter(sides).most_common(1)[0][1] == 1
        assert set(sides) | set(data.fill) == set(claims())
        assert not set(sides) & set(data.fill)
        a, b = data.pages
        assert Claim("B and A", NO, ("B", "A")) in (*a.training, *a.validation), "with the page of more claims"
        assert abs(len(a.training) - len(a.validation)) <= 1
        for label in (YES, NO):
            counts = [sum(claim.label == label for claim in side) for side in (a.training, a.validation)]
            assert abs(counts[0] - counts[1]) <= 1
        assert data.label_counts == Counter(c.label for p in (a, b) for c in p.validation) | {UNKNOWN: 0}
    assert group_by_page(claims(), {"A": "a"}, seed=1) == group_by_page(claims(), {"A": "a"}, seed=1)
    assert group_by_page(claims(), {"A": "a"}, seed=1) != group_by_page(claims(), {"A": "a"}, seed=2)


def test_training_claims_of_another_file_leave_all_others_to_judge() -> None:
    training = [Claim("taught", NO, ("A",)), Claim("of no page here", YES, ("Z",))]
    data = group_by_page(claims(), {"A": "a", "B": "b"}, training_claims=training)
    assert [page.title for page in data.pages] == ["A"], "B has no claim to train on"
    assert data.pages[0].training == (training[0],)
    assert len(data.pages[0].validation) == 10
    assert data.fill == (training[1],)


def sample() -> FeverData:
    rome = Page("Rome", "Rome is a city.", (Claim("Rome is old.", YES), Claim("Rome is small.", NO)), (Claim("x", NO),))
    oslo = Page("Oslo", "Oslo is a city.", (Claim("Oslo is cold.", YES),), (Claim("y", YES),))
    return FeverData((rome, oslo), (Claim("Nobody knows.", UNKNOWN), Claim("Cats fly.", NO)), 2, 2, 2)


def test_the_prompt_is_the_experiments() -> None:
    shots = [Claim("Rome is old.", YES), Claim("Rome is small.", NO)]
    expected = (
        "Determine the factuality of the following claims\n"
        "Answer candidates: (a) supports, (b) refutes, (c) not enough info\n"
        "\nClaim: Rome is old.\nA: (a)\n"
        "\nClaim: Rome is small.\nA: (b)\n"
        "\nClaim: Rome is far.\nA:"
    )
    assert few_shot_prompt(Claim("Rome is far.", YES), shots) == expected
    assert few_shot_prompt(Claim("Rome is far.", YES), shots, "Rome is a city.") == f"Rome is a city.\n\n{expected}"


def test_shots_are_of_the_page_and_filled_by_label_from_elsewhere() -> None:
    data = sample()
    rome, oslo = data.pages
    for page, claim in ((rome, rome.validation[0]), (oslo, oslo.validation[0])):
        for seed in range(20):
            three = choose_shots(data, page, claim, 3, seed)
            assert {shot.label for shot in three} == set(LABELS), "labels take turns"
            assert len(set(three)) == 3
            assert set(page.training) <= set(three), "the page's own come first"
            assert choose_shots(data, page, claim, 2, seed) == three[:2]
            assert choose_shots(data, page, claim, 0, seed) == []
    firsts = {choose_shots(data, rome, rome.validation[0], 1, seed)[0].label for seed in range(20)}
    assert firsts == set(LABELS)
    taught = rome.training[0]
    assert all(taught not in choose_shots(data, rome, taught, 3, seed) for seed in range(20)), "never its own answer"
    judged = {claim for page in data.pages for claim in page.validation}
    assert not judged & set(choose_shots(data, rome, taught, 5, 0))


def test_what_is_written_of_the_pages() -> None:
    data = sample()
    assert [document.text for document in documents(data)] == ["Rome is a city.", "Oslo is a city."]
    items = solved_claims(data, 1, seed=0)
    assert [item.answer for item in items] == ["(a)", "(b)", "(a)"]
    assert all(item.question.count("\nClaim: ") == 2 and item.question.endswith("A:") for item in items)


@pytest.mark.parametrize(
    ("title", "text", "expected"),
    [
        (FILM, "Soul Food was released by Fox 2000 Pictures.", ("Soul Food was released by", "Fox 2000 Pictures")),
        (FILM, "Vanessa Williams acted in Soul Food in 1997.", ("Vanessa Williams acted in Soul Food in", "1997")),
        (FILM, "Soul Food is a comedy.", None),
        (FILM, "The film stars Nia Long.", None),
        (FILM, "Nia Long is in Soul Food.", None),
        ("Oslo", "Oslo is the capital of the Kingdom of Norway.", ("Oslo is the capital of the", "Kingdom of Norway")),
    ],
)
def test_a_claim_is_a_fact_where_it_ends_in_a_name_or_number(
    title: str, text: str, expected: tuple[str, str] | None
) -> None:
    found = claim_as_fact(Page(title, "", (), ()), Claim(text, YES))
    subject = "Oslo" if title == "Oslo" else "Soul Food"
    assert found == (None if expected is None else Fact(expected[0], subject, expected[1]))


def test_only_supported_claims_become_facts_one_a_prompt() -> None:
    own = (Claim("Rome is in Italy.", YES), Claim("Rome is in Spain.", NO), Claim("Rome is in Europe.", YES))
    data = FeverData((Page("Rome", "x", own, ()),), (), 1, 1, 1)
    assert facts(data) == [Fact("Rome is in", "Rome", "Italy")]
