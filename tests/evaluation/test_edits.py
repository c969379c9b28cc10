"""Scores of edits: against a model whose probabilities are known, and against one prompt at a time in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import models, normalizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from memory_adapters import Fact
from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.tokens import score_rows, shared_length, tokenize
from memory_adapters.evaluation.records import EditRecord, Question
from memory_adapters.evaluation.scores.edits import (
    EditScores,
    KindScores,
    score_continuations,
    score_edits,
    score_kinds,
    score_records,
)
from tests.support.bigrams import LOUVRE, MINE, TOWER, Bigrams, word_tokenizer
from tests.support.models import byte_tokenizer, tiny_model


@pytest.fixture
def words() -> Any:
    return word_tokenizer()


def test_scores_by_hand(words: Any) -> None:
    scores = score_edits(Bigrams(), words, [LOUVRE, TOWER])
    # sqrt(0.4 · 0.95) > 0.6: compared by the mean log-probability per token, New York is preferred, though not decoded.
    assert scores.efficacy == 1
    assert scores.exact_match == 0.5
    assert scores.token_accuracy == pytest.approx((1 + 1 / 2) / 2)
    assert scores.paraphrase == scores.paraphrase_exact_match == scores.paraphrase_token_accuracy == 0.75
    assert scores.neighbourhood == scores.neighbourhood_exact_match == scores.neighbourhood_token_accuracy == 0.5
    assert scores.score == pytest.approx(3 / (1 / 1 + 1 / 0.75 + 1 / 0.5))
    assert scores.token_score == pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.5))
    assert scores.portability_exact_match == scores.portability_token_accuracy == 0.5


def test_a_record_counts_once_however_many_prompts_it_has(words: Any) -> None:
    other = EditRecord(Fact("Tower in", "Tower", "Rome"), "Paris", ("Tower to",), (("Tower to", "Paris"),) * 3)
    scores = score_edits(Bigrams(), words, [LOUVRE, other])
    assert scores.paraphrase == pytest.approx((3 / 4 + 0) / 2)
    assert scores.neighbourhood == pytest.approx((1 / 2 + 1) / 2)


def test_without_a_true_target(words: Any) -> None:
    scores = score_edits(Bigrams(), words, [MINE])
    assert scores.efficacy is scores.paraphrase is scores.neighbourhood is scores.score is None
    assert scores.neighbourhood_exact_match is scores.token_score is scores.portability_exact_match is None
    assert scores.exact_match == scores.token_accuracy == 0
    assert scores.paraphrase_exact_match == scores.paraphrase_token_accuracy == 1
    both = score_edits(Bigrams(), words, [MINE, LOUVRE])
    assert both.efficacy == 1
    assert both.exact_match == 0.5
    assert both.paraphrase == 0.75
    assert both.paraphrase_exact_match == (1 + 0.75) / 2


def test_any_of_several_right_answers_counts(words: Any) -> None:
    pair = EditRecord(LOUVRE.fact, "Paris", neighbours=(("Tower in", "Paris"),), portability=(("Tower to", "Rome"),))
    either = EditRecord(
        LOUVRE.fact,
        "Paris",
        neighbours=(Question("Tower in", "Paris", ("Rome",)),),
        portability=(Question("Tower to", "Rome", ("York", "Paris")),),
    )
    first, second = score_records(Bigrams(), words, [pair, either])
    assert (first.neighbourhood_exact_match, first.portability_exact_match) == (0, 0)
    assert (second.neighbourhood_exact_match, second.portability_exact_match) == (1, 1)
    assert score_kinds(Bigrams(), words, [pair, either])[1] == [], "no kinds are named"


def test_scores_by_kind(words: Any) -> None:
    first = EditRecord(
        LOUVRE.fact,
        neighbours=(
            Question("Orsay in", "Paris", kind="Forgetfulness"),
            Question("Orsay to", "Paris", kind="Relation"),
        ),
        portability=(
            Question("Tower by", "New York", kind="Reasoning"),
            Question("Tower to", "Rome", kind="Reasoning"),
        ),
    )
    second = EditRecord(TOWER.fact, portability=(Question("Tower in", "Rome", kind="Reasoning"), ("Tower to", "Rome")))
    scores, kinds = score_kinds(Bigrams(), words, [first, second, MINE])
    assert scores == score_records(Bigrams(), words, [first, second, MINE])
    assert kinds == [
        KindScores("neighbours", "Forgetfulness", 1, 0, 0, 0),
        KindScores("neighbours", "Relation", 1, 1, 1, 1),
        KindScores("portability", "Reasoning", 2, None, (1 / 2 + 1) / 2, (1 / 2 + 1) / 2),
    ]


def test_the_separator_of_a_fact_joins_its_target(words: Any) -> None:
    asked = [(prompt, text) for prompt in ("Ada spoke", "Ada wrote") for text in ("Latin", "Greek")]
    joined = EditRecord(Fact("Ada spoke", "Ada", "Latin", separator=""), "Greek", ("Ada wrote",))
    plain = EditRecord(Fact("Ada spoke", "Ada", "Latin"), "Greek", ("Ada wrote",))
    model, tokenizer = tiny_model(), byte_tokenizer()
    told = [score_records(model, tokenizer, [record])[0].token_accuracy for record in (joined, plain)]
    right = score_rows(
        model,
        find_decoder(model),
        [tokenize(tokenizer, f"{prompt}{mark}{text}") for mark in ("", " ") for prompt, text in asked[:1]],
        [len("Ada spoke")] * 2,
    )
    assert told == pytest.approx((right.right / right.count).tolist())


def test_the_harmonic_mean_of_nothing_is_nothing(words: Any) -> None:
    no_neighbours = score_edits(Bigrams(), words, [TOWER])
    assert no_neighbours.score is None
    damaged = EditRecord(LOUVRE.fact, "Paris", ("Louvre in",), (("Orsay in", "Paris"),))
    assert score_edits(Bigrams(), words, [damaged]).score == 0


def test_log_probabilities_by_hand(words: Any) -> None:
    queries = [("Tower near", "New York"), ("Tower near", "Paris"), ("Tower near", "New"), ("Louvre in", "Rome")]
    queries += [("Tower near", "New York")]
    scored = score_continuations(Bigrams(), words, queries)
    expected = [math.log(0.4 * 0.95) / 2, math.log(0.6), math.log(0.4), math.log(0.6)]
    assert [log_prob for log_prob, _ in scored] == pytest.approx([*expected, expected[0]], abs=1e-6)
    assert [exact for _, exact in scored] == [False, True, False, True, False]


def test_prompts_are_read_once(words: Any) -> None:
    model = Bigrams()
    read: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _m, _a, given: read.append(given["attention_mask"].sum()), with_kwargs=True)
    queries = [("Louvre in", "Rome"), ("Louvre in", "Paris"), ("Tower near", "New York"), ("Tower near", "Paris")]
    score_continuations(model, words, queries * 5)
    assert sum(read) == len(["Louvre", "in"]) + len(["Tower", "near", "New"])


def with_special_tokens(template: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer, adding what a tokenizer may add: the beginning or the end of text."""
    tokenizer = byte_tokenizer()
    post = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


TOKENIZERS = {
    "no special tokens": byte_tokenizer,
    "beginning": lambda: with_special_tokens("<s> $A"),
    "beginning and end": lambda: with_special_tokens("<s> $A </s>"),
}
RECORDS = [
    EditRecord(
        Fact("The Louvre is in", "The Louvre", "Rome"),
        "Paris",
        ("To see The Louvre go to", "The Louvre:"),
        (("Notre-Dame is in", "Paris"), ("Big Ben is in", "London"), ("Orsay?", "Pa")),
        portability=(("The river of The Louvre is the", "Tiber"),),
    ),
    EditRecord(Fact("Ada spoke", "Ada", "Romansh"), "Rom", ("Ada wrote in",), (("Ida spoke", "English"),)),
    EditRecord(Fact("ルーヴルは", "ルーヴル", "ローマ"), "パリ"),
    EditRecord(Fact("Nobody knows Bob of", "Bob", "x")),
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_scores_one_prompt_at_a_time_in_float64(architecture: str, kind: str) -> None:
    model, tokenizer = tiny_model(architecture), TOKENIZERS[kind]()
    exact = tiny_model(architecture).double()
    starts = [1] if kind.startswith("beginning") else []

    def plain(prompt: str, joined: str) -> tuple[float, float]:
        before, after = ([byte + 4 for byte in encoded(text)] for text in (prompt, joined))
        ids = torch.tensor([starts + before + after])
        predicted = exact(ids).logits[0, len(starts) + len(before) - 1 : -1].log_softmax(-1)
        targets = torch.tensor(after)
        log_prob = predicted.gather(1, targets[:, None]).mean().item()
        return log_prob, (predicted.argmax(-1) == targets).double().mean().item()

    def encoded(text: str) -> list[int]:
        return [i - 4 for i in byte_tokenizer()(text)["input_ids"]]

    def asked(record: EditRecord) -> EditScores:
        space = "" if record.fact.subject == "ルーヴル" else " "
        new = space + record.fact.target
        shares: dict[str, Any] = {}
        for name, prompts in (("", [record.fact.prompt]), ("paraphrase_", record.paraphrases)):
            scored = [plain(prompt, new) for prompt in prompts]
            shares[f"{name}exact_match"] = average([share == 1 for _, share in scored])
            shares[f"{name}token_accuracy"] = average([share for _, share in scored])
            shares[name] = None
            if record.true_target is not None:
                true = [plain(prompt, space + record.true_target) for prompt in prompts]
                shares[name] = average([a[0] > b[0] for a, b in zip(scored, true, strict=True)])
        kept = [(plain(prompt, f" {answer}"), plain(prompt, new)) for prompt, answer in record.neighbours]
        implied = [plain(question, f" {answer}") for question, answer in record.portability]
        return EditScores(
            efficacy=shares.pop(""),
            paraphrase=shares.pop("paraphrase_"),
            neighbourhood=average([a[0] > b[0] for a, b in kept]),
            neighbourhood_exact_match=average([a[1] == 1 for a, _ in kept]),
            neighbourhood_token_accuracy=average([a[1] for a, _ in kept]),
            portability_exact_match=average([share == 1 for _, share in implied]),
            portability_token_accuracy=average([share for _, share in implied]),
            **shares,
        )

    scored = score_records(model, tokenizer, RECORDS)
    for record, scores in zip(RECORDS, scored, strict=True):
        assert scores.to_dict() == pytest.approx(asked(record).to_dict(), abs=1e-6)
    queries = [(record.fact.prompt, record.fact.target) for record in RECORDS]
    for (prompt, target), (log_prob, _) in zip(queries, score_continuations(model, tokenizer, queries), strict=True):
        assert log_prob == pytest.approx(plain(prompt, target if prompt == "ルーヴルは" else f" {target}")[0], abs=1e-4)


def average(values: list[Any]) -> float | None:
    return sum(values) / len(values) if values else None


def test_a_token_that_spans_the_end_of_the_prompt_is_scored() -> None:
    vocabulary = byte_tokenizer().get_vocab()
    vocabulary["ĠB"] = vocabulary.pop("~")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[("Ġ", "B")])
    assert len(tokenizer("in ")["input_ids"]) == len(tokenizer("in B")["input_ids"]) == 3
    model = tiny_model()
    for prompt, target in (("in ", "Bern"), ("in", "Bern"), ("in ", "B"), ("in", "B")):
        ids = tokenizer(prompt)["input_ids"]
        rest = tokenizer(target if prompt.endswith(" ") else f" {target}")["input_ids"]  # what generation can give
        with torch.no_grad():
            predicted = model(torch.tensor([ids + rest])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        expected = predicted[range(len(rest)), rest].mean().item()
        ((log_prob, _),) = score_continuations(model, tokenizer, [(prompt, target)])
        assert log_prob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_batches_change_nothing(kind: str) -> None:
    model, tokenizer = tiny_model("gpt2"), TOKENIZERS[kind]()
    alone = [score_records(model, tokenizer, [record], batch_tokens=1)[0] for record in RECORDS]
    assert score_records(model, tokenizer, RECORDS) == alone
    queries = [(r.fact.prompt, target) for r in RECORDS for target in ("Rome", "Rom", "Romansh", "R", "Paris")]
    together = score_continuations(model, tokenizer, queries)
    rows = [tokenize(tokenizer, f"{p}{'' if p == 'ルーヴルは' else ' '}{target}") for p, target in queries]
    first = [max(shared_length(tokenize(tokenizer, p), row), 1) for (p, _), row in zip(queries, rows, strict=True)]
    expected = score_rows(model, find_decoder(model), rows, first)
    assert [x for x, _ in together] == pytest.approx((expected.log_prob / expected.count).tolist(), abs=1e-5)
    assert [x for _, x in together] == (expected.right == expected.count).tolist()


def test_the_model_is_left_in_the_mode_it_was_in(words: Any) -> None:
    model = Bigrams().train()
    model.blocks[0] = nn.Dropout(0.9).train()
    model.head.eval()
    assert score_edits(model, words, [LOUVRE]).exact_match == 1
    assert model.training
    assert model.blocks[0].training
    assert not model.head.training


def test_nothing_to_score(words: Any) -> None:
    with pytest.raises(ValueError, match="`records` is empty"):
        score_edits(Bigrams(), words, [])
    words.backend_tokenizer.normalizer = normalizers.Replace("…", "")
    with pytest.raises(ValueError, match=r"`target='…'` adds no token to `prompt='Louvre in'`"):
        score_continuations(Bigrams(), words, [("Louvre in", "Rome"), ("Louvre in", "…")])
