"""Decoded and generated text: batches against one at a time, entropies counted directly, TF-IDF by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memory_adapters.evaluation.scores.generation import (
    consistency,
    fluency,
    generate_texts,
    greedy_success,
    ngram_entropy,
)
from memory_adapters.evaluation.scores.perplexity import load_wikitext
from tests.support.models import byte_tokenizer, tiny_model

PROMPTS = ["The Louvre is in", "A", "Where is the Tower of Pisa, which leans?", "ルーヴルは", "A b", "The Louvre is i"]


def decoded(model: Any, tokenizer: Any, prompt: str, num_tokens: int) -> str:
    """Greedily, without a cache or padding."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(num_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def words_of(text: str) -> list[str]:
    """Runs of ASCII letters that stand by themselves."""
    runs = "".join(c if c.isalnum() or c == "_" else " " for c in text).split()
    return [run for run in runs if run.isascii() and run.isalnum()]


# What a model's own settings ask for must not be followed.
OTHERWISE = dict(do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=1)


@pytest.mark.parametrize("batch_tokens", [1, 130, 4096])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "gemma3_text"])
def test_batches_change_nothing(architecture: str, batch_tokens: int) -> None:
    model, tokenizer = tiny_model(architecture), byte_tokenizer()
    model.generation_config.update(**OTHERWISE)
    plain = [p + decoded(model, tokenizer, p, 60 - len(tokenizer(p)["input_ids"])) for p in PROMPTS]
    assert generate_texts(model, tokenizer, PROMPTS, num_tokens=60, top_k=1, batch_tokens=batch_tokens) == plain


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_decoding_in_batches_is_decoding_one_at_a_time(architecture: str) -> None:
    model, tokenizer = tiny_model(architecture), byte_tokenizer()
    model.generation_config.update(**OTHERWISE)
    texts = [decoded(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    found = [word for text in texts for word in words_of(text) if len(word) < 24]
    assert len(set(found)) >= 5
    prompts = [prompt for prompt in PROMPTS for _ in found]
    expected = [word in words_of(text) for text in texts for word in found]
    assert greedy_success(model, tokenizer, prompts, found * len(PROMPTS), num_tokens=24) == expected
    assert greedy_success(model, tokenizer, prompts, found * len(PROMPTS), num_tokens=24, batch_tokens=1) == expected
    assert {True, False} == set(expected)


class Says:
    """Stands for a model that continues every prompt with one text."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        self.tokenizer, self.num_new = byte_tokenizer(), 0
        self.model = tiny_model()
        monkeypatch.setattr(self.model, "generate", self.generate)
        self.ids = self.tokenizer(text)["input_ids"]

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        self.num_new = max_new_tokens
        said = torch.tensor([[*self.ids, 2, *[0] * max_new_tokens]] * len(input_ids))[:, :max_new_tokens]
        return torch.cat([input_ids, said], 1)


@pytest.mark.parametrize(
    ("text", "target", "found"),
    [
        (" the city of Rome, of course", "Rome", True),
        (" Rome", "Rome ", True),
        (" Romeo", "Rome", False),
        (" Chrome", "Rome", False),
        (" Jerome", "rome", False),
        (" in 20112", "2011", False),
        (" rome", "Rome", False),
        ("ローマです", "ローマ", True),
        ("로마에 있다", "로마", True),
        (" C++17", "C++", True),
        (" a.c", "abc", False),
        (" New York", "New York", True),
    ],
)
def test_the_target_is_looked_for_as_whole_words(
    monkeypatch: pytest.MonkeyPatch, text: str, target: str, found: bool
) -> None:
    says = Says(monkeypatch, text)
    assert greedy_success(says.model, says.tokenizer, ["A"], [target], num_tokens=40) == [found]


def test_as_many_tokens_as_the_longest_target_has(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "seventeen letters"
    says = Says(monkeypatch, f" {long}")
    assert greedy_success(says.model, says.tokenizer, ["A", "B"], ["Rome", "letters"]) == [False, False]
    assert says.num_new == 16
    assert greedy_success(says.model, says.tokenizer, ["A", "A"], [long, "Rome"]) == [True, False]
    assert says.num_new == len(f" {long}")
    with pytest.raises(ValueError, match=r"`num_tokens=3` cannot hold the target 'Rome': give at least 5"):
        greedy_success(says.model, says.tokenizer, ["A"], ["Rome"], num_tokens=3)
    with pytest.raises(ValueError, match="`targets` has 1 texts for 2 `prompts`"):
        greedy_success(says.model, says.tokenizer, ["A", "B"], ["Rome"])
    assert greedy_success(says.model, says.tokenizer, [], []) == []


def test_generated_texts_have_one_length_and_one_seed() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    state = torch.get_rng_state()
    model.train()
    texts = generate_texts(model, tokenizer, PROMPTS, num_tokens=60)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert [text.startswith(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)] == [True] * len(PROMPTS)
    assert generate_texts(model, tokenizer, PROMPTS, num_tokens=60) == texts
    assert generate_texts(model, tokenizer, PROMPTS, num_tokens=60, seed=1) != texts
    with pytest.raises(ValueError, match="`num_tokens=16` includes the prompt, and one has"):
        generate_texts(model, tokenizer, PROMPTS, num_tokens=16)


def test_sampled_text_goes_on_where_greedy_decoding_ends() -> None:
    model, tokenizer = tiny_model("gpt2"), byte_tokenizer()
    prompt = next(p for p in PROMPTS if not decoded(model, tokenizer, p, 1).islower())
    letters = set(tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"])
    model.generation_config.eos_token_id = [i for i in range(len(tokenizer)) if i not in letters]
    (text,) = generate_texts(model, tokenizer, [prompt], num_tokens=60, top_k=5)
    said = text.removeprefix(prompt)
    assert said.isascii()
    assert said.islower()
    assert len(tokenizer(text)["input_ids"]) == 60
    assert not any(greedy_success(model, tokenizer, [prompt] * 26, list("abcdefghijklmnopqrstuvwxyz")))


def counted(text: str, n: int) -> float:
    """Entropy in bits, n-gram by n-gram, in plain loops."""
    words = text.split()
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    entropy = 0.0
    for gram in sorted(set(grams)):
        share = sum(other == gram for other in grams) / len(grams)
        entropy -= share * math.log(share) / math.log(2)
    return entropy


TEXTS = ["to be or not to be , that is the question", "no no no no no no", "one two three four five"]


def test_fluency_counted_directly() -> None:
    for text in TEXTS:
        for n in (1, 2, 3):
            assert ngram_entropy(text, n) == pytest.approx(counted(text, n), abs=1e-12)
    weighted = [(2 / 3 * counted(text, 2) + 4 / 3 * counted(text, 3)) / 2 for text in TEXTS]
    assert fluency(TEXTS) == pytest.approx(100 * sum(weighted) / 3)
    assert fluency(TEXTS[1:2]) == 0
    assert fluency(TEXTS[2:]) == pytest.approx(50 * (2 / 3 * math.log2(4) + 4 / 3 * math.log2(3)))
    assert fluency(["", "two words"]) == 0
    assert ngram_entropy("don't stop.", 1) == math.log2(5)
    assert ngram_entropy("ローマは city", 2) == math.log2(4)
    with pytest.raises(ValueError, match="`texts` is empty"):
        fluency([])


def test_fluency_of_ordinary_text(data: Path) -> None:
    words = load_wikitext(data / "wikitext2" / "test.txt").split()[:80_000]
    pieces = [" ".join(words[i : i + 75]) for i in range(0, len(words), 75)]
    assert 600 < fluency(pieces) < 650


def test_consistency_by_hand() -> None:
    references = [["rome is old", "rome is big"], ["bern is small"]]
    generated = [["rome rome", "is unheard of"], ["nothing known"]]
    vocabulary = ["bern", "big", "is", "old", "rome", "small"]
    documents = [text.split() for texts in references for text in texts]
    idf = np.array([math.log((1 + 3) / (1 + sum(word in d for d in documents))) + 1 for word in vocabulary])

    def vector(texts: list[str]) -> np.ndarray:
        words = " ".join(texts).split()
        return np.array([words.count(word) for word in vocabulary]) * idf

    a, b = vector(generated[0]), vector(references[0])
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert consistency(generated, references) == pytest.approx(100 * (cosine + 0) / 2)
    assert consistency(references, references) == pytest.approx(100)
    with pytest.raises(ValueError, match="`references` has 1 entries for 2"):
        consistency(generated, references[:1])


def test_consistency_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sklearn.feature_extraction")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ImportError, match=r"pip install memory-adapters\[evaluation\]"):
        consistency([["a"]], [["a"]])
