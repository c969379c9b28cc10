"""Perplexity and divergence on a text, against torch.distributions and a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from memory_adapters.evaluation.edit_report import evaluate_edits
from memory_adapters.evaluation.records import EditRecord
from memory_adapters.evaluation.scores.perplexity import perplexity, perplexity_and_divergence, predictions
from memory_adapters.items import Fact
from tests.support.models import byte_tokenizer, tiny_model

TEXT = "Rome was not built in a day, nor was Paris."


def test_perplexity_is_that_of_a_plain_loop() -> None:
    model, ids = tiny_model(), byte_tokenizer()(TEXT, add_special_tokens=False)["input_ids"][:20]
    losses = []
    for start in (0, 8, 16):
        window = torch.tensor([ids[start : start + 8]])
        logits = model(input_ids=window).logits[0].double()
        losses += [-logits[i].log_softmax(-1)[window[0, i + 1]].item() for i in range(window.shape[1] - 1)]
    found = perplexity(model, byte_tokenizer(), TEXT, window=8, max_tokens=20)
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_divergence_is_that_of_torch_distributions(half: bool) -> None:
    base, other, tokenizer = tiny_model(), tiny_model(seed=3), byte_tokenizer()
    kept = [found.half() if half else found for found, _ in predictions(base, tokenizer, TEXT, window=16)]
    both = zip(
        predictions(base, tokenizer, TEXT, window=16), predictions(other, tokenizer, TEXT, window=16), strict=True
    )
    each = [kl_divergence(Categorical(logits=p), Categorical(logits=q)) for (p, _), (q, _) in both]
    read, found = perplexity_and_divergence(other, tokenizer, TEXT, kept, window=16)
    assert found == pytest.approx(torch.cat(each).mean().item(), rel=1e-3 if half else 1e-5)
    assert found > 0.01
    assert read == perplexity(other, tokenizer, TEXT, window=16)
    begun = perplexity_and_divergence(other, tokenizer, TEXT, kept[:1], window=16)
    assert begun == (read, pytest.approx(each[0].mean().item(), rel=1e-3)), "the perplexity is still of all windows"
    assert perplexity_and_divergence(base, tokenizer, TEXT, kept, window=16)[1] == pytest.approx(0, abs=1e-6)


def test_predictions_of_another_text_are_refused() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    kept = [found for found, _ in predictions(model, tokenizer, TEXT, window=16)]
    for text in (TEXT * 2, TEXT[:16]):
        with pytest.raises(ValueError, match="`base` has other windows"):
            perplexity_and_divergence(model, tokenizer, text, kept, window=16)


def test_the_report_compares_the_beginning_of_the_text() -> None:
    base, other, tokenizer = tiny_model(), tiny_model(seed=3), byte_tokenizer()
    records, text = [EditRecord(Fact("Rome is in", "Rome", "Peru"))], TEXT * 20
    kept = [next(iter(predictions(base, tokenizer, text)))[0]]
    report = evaluate_edits(other, tokenizer, records, text=text, base_predictions=kept, greedy=False, progress=False)
    assert (report.perplexity, report.divergence) == perplexity_and_divergence(other, tokenizer, text, kept)
    assert report.perplexity == perplexity(other, tokenizer, text)
