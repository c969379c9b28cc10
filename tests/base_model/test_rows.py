"""What follows a prompt: rows begin with the very tokens that a model reads when it is asked."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memory_adapters import Fact, QuestionAnswer
from memory_adapters.base_model.chat import rendered_question
from memory_adapters.base_model.item_rows import chat_row, fact_row, question_row
from memory_adapters.base_model.tokens import VIRTUAL_TOKENS_A_BATCH, batches_of, continued_prompt, tokenize
from memory_adapters.memit.prompts import bare_rows, chat_context
from tests.support.models import byte_tokenizer

PARTS = "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the merges "ab" and " a", so that tokens may span the end of a prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["</s>", *alphabet, "ab", "Ġa", "Ġab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("Ġ", "ab")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize(
    ("prompt", "continuation"), [("x a", "b"), ("x ", "ab"), ("x", " ab"), ("x", "y"), ("a", "bab")]
)
def test_a_row_begins_with_the_tokens_of_the_prompt(prompt: str, continuation: str) -> None:
    tokenizer = merging_tokenizer()
    ids, first = continued_prompt(tokenizer, prompt, continuation)
    assert ids[:first] == tokenize(tokenizer, prompt)
    assert tokenizer.decode(ids[first:]) == continuation


def test_batches_are_of_like_length_and_limited() -> None:
    rows = [[1] * length for length in (5, 1, 3, 1, 8)]
    assert list(batches_of(rows, 6)) == [[1, 3], [2], [0], [4]]
    assert list(batches_of(rows, virtual_tokens=VIRTUAL_TOKENS_A_BATCH // 2)) == [[1, 3], [2, 0], [4]]
    assert list(batches_of(rows, 6, virtual_tokens=2 * VIRTUAL_TOKENS_A_BATCH)) == [[1], [3], [2], [0], [4]]
    assert list(batches_of([])) == []


def test_every_kind_of_row_begins_so() -> None:
    tokenizer = merging_tokenizer()
    fact = Fact("Xa", "X", "b", separator="")
    rows = [fact_row(fact, tokenizer), fact_row(fact, tokenizer, "So. "), *bare_rows([fact], tokenizer, 99)]
    rows.append(question_row(QuestionAnswer("$", "ab"), tokenizer))
    prompts = ["Xa", "So. Xa", "Xa", "$"]
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.input_ids[: row.first_label] == tokenize(tokenizer, prompt)


@pytest.mark.parametrize(
    "template", [byte_tokenizer(chat=True).chat_template, PARTS, PARTS.replace("{{ m['role'] }}: ", "")]
)
def test_a_question_is_found_in_the_chat(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    text, place = rendered_question(tokenizer, "user?")  # as the role is called, too
    assert text[place:].startswith("user?")
    row = chat_row(QuestionAnswer("user?", "Anna"), tokenizer)
    assert tokenizer.decode([row.input_ids[i] for i in row.key_positions]) == "user?"
    assert row.input_ids[-1] == tokenizer.eos_token_id  # an answer ends
    assert tokenizer.decode(row.input_ids[row.first_label : -1]) == "Anna"
    fact = Fact("{} is in", "Bonn", "Rome")
    assert tokenizer.decode([chat_row(fact, tokenizer).input_ids[chat_row(fact, tokenizer).key_positions[0]]]) == "n"
    context = chat_context(tokenizer)
    assert context.before + "user?" + context.after == text


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('no') }}", "Hello", "{{ messages[0]['content'] | upper }}"]
)
def test_a_template_that_does_not_hold_the_question_gives_no_row(template: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert rendered_question(tokenizer, "Who?") is None
    assert chat_row(QuestionAnswer("Who?", "Anna"), tokenizer) is None
    with pytest.raises(ValueError, match="`chat=True`"):
        chat_context(tokenizer)
