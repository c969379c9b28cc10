"""Judge what an edited model generates: does it name the target, is it fluent, does it fit the edit?"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import execution_device, find_decoder
from memory_adapters.base_model.modes import generating
from memory_adapters.base_model.seeding import seeded
from memory_adapters.base_model.tokens import batches_of, tokenize
from memory_adapters.peft_layers.virtual_tokens import num_virtual_tokens

__all__ = ["consistency", "fluency", "generate_texts", "greedy_success", "greedy_texts", "holds", "ngram_entropy"]

BATCH_TOKENS = 4096
LEAST_DECODED = 16
ENTROPY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
# Settings that a model's own generation config may change.
NEUTRAL: dict[str, Any] = dict(
    num_beams=1, temperature=1.0, top_p=1.0, typical_p=1.0, repetition_penalty=1.0, no_repeat_ngram_size=0
)
# Kana, ideographs: written without spaces, so each character counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def greedy_success(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    num_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> list[bool]:
    """Find whether the text that the model decodes greedily after each prompt holds the target.

    The target is looked for as it is written, and as whole words: `"Rome"` is not in `"Romeo"`.

    Args:
        model: A causal LM, with what is to be judged active.
        tokenizer: Its tokenizer.
        prompts: Texts to continue.
        targets: What to look for, one for each prompt.
        num_tokens: New tokens to decode for each; by default 16, or as many as the longest target has if that is more.
        batch_tokens: Most tokens decoded together, prompts and padding included.
        progress: Show a bar.

    Raises:
        ValueError: If there are not as many targets as prompts, or a target has more than `num_tokens` tokens.
    """
    if len(prompts) != len(targets):
        raise ValueError(f"`targets` has {len(targets)} texts for {len(prompts)} `prompts`: give one for each.")
    lengths = {target: len(tokenizer(f" {target}", add_special_tokens=False)["input_ids"]) for target in set(targets)}
    longest = max(lengths, key=lambda target: lengths[target], default="")
    if num_tokens is None:
        num_tokens = max(LEAST_DECODED, lengths.get(longest, 0))
    elif num_tokens < lengths.get(longest, 1):
        raise ValueError(
            f"`num_tokens={num_tokens}` cannot hold the target {longest!r}: give at least {lengths.get(longest, 1)}."
        )
    texts = greedy_texts(model, tokenizer, prompts, num_tokens=num_tokens, batch_tokens=batch_tokens, progress=progress)
    return [holds(text, target.strip()) for text, target in zip(texts, targets, strict=True)]


def greedy_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_tokens: int = LEAST_DECODED,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> list[str]:
    """Return the text that the model decodes greedily after each prompt, without the prompt.

    Args:
        model: A causal LM, with what is to be judged active.
        tokenizer: Its tokenizer.
        prompts: Texts to continue; each is read once.
        num_tokens: Most new tokens of each.
        batch_tokens: Most tokens decoded together, prompts and padding included.
        progress: Show a bar.
    """
    asked = list(dict.fromkeys(prompts))
    rows = [tokenize(tokenizer, prompt) for prompt in asked]
    continued = _continued(
        model, tokenizer, rows, [num_tokens] * len(rows), batch_tokens=batch_tokens, progress=progress, do_sample=False
    )
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in continued]
    decoded = dict(zip(asked, texts, strict=True))
    return [decoded[prompt] for prompt in prompts]


def holds(text: str, target: str) -> bool:
    """Return whether a text holds a target as whole words."""
    before = r"(?<!\w)" if _is_spaced(target[0]) else ""
    after = r"(?!\w)" if _is_spaced(target[-1]) else ""
    return re.search(before + re.escape(target) + after, text) is not None


def _is_spaced(character: str) -> bool:
    """Return whether words that begin or end with it stand between spaces: letters and digits that are not wide."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_tokens: int = 100,
    top_k: int = 5,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> list[str]:
    """Sample one text from each prompt, as fluency and consistency are measured: 100 tokens with the prompt, top-k 5.

    Args:
        model: A causal LM, with what is to be judged active.
        tokenizer: Its tokenizer.
        prompts: Beginnings of the texts.
        num_tokens: Tokens of each text, those of its prompt included.
        top_k: Each token is sampled from so many of the likeliest, at temperature 1.
        seed: Seed of the sampling; the global generators are left as they were.
        batch_tokens: Most tokens generated together, prompts and padding included. A text depends on what it shares a
            batch with, so the same seed gives the same texts only with the same prompts and `batch_tokens`.
        progress: Show a bar.

    Returns:
        Each prompt with its continuation.

    Raises:
        ValueError: If a prompt has `num_tokens` tokens or more.
    """
    rows = [tokenize(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, rows), default=0)
    if longest >= num_tokens:
        raise ValueError(f"`num_tokens={num_tokens}` includes the prompt, and one has {longest} tokens: give more.")
    num_new = [num_tokens - len(row) for row in rows]
    sampling: dict[str, Any] = dict(do_sample=True, top_k=top_k, min_p=0.0)
    with seeded(seed):
        continued = _continued(
            model, tokenizer, rows, num_new, batch_tokens=batch_tokens, progress=progress, **sampling
        )
    tails = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in continued]
    return [prompt + tail for prompt, tail in zip(prompts, tails, strict=True)]


@torch.no_grad()
def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    num_new: Sequence[int],
    *,
    batch_tokens: int,
    progress: bool,
    **settings: Any,
) -> list[list[int]]:
    """Generate as many new tokens of each row as `num_new` says, in batches of like length padded on the left.

    Greedy decoding may end earlier; sampled text goes on, as fluency depends on its length.
    """
    device = execution_device(find_decoder(model).embeddings)
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(token for token in known if token is not None)
    continued: list[list[int]] = [[] for _ in rows]
    room = [range(len(row) + max(num_new)) for row in rows]
    with generating(model), tqdm(total=len(rows), desc="generating", unit="text", disable=not progress) as bar:
        for batch in batches_of(room, batch_tokens, virtual_tokens=num_virtual_tokens(model)):
            length = max(len(rows[i]) for i in batch)
            most = max(num_new[i] for i in batch)
            generated = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(
                    [[padding] * (length - len(rows[i])) + [*rows[i]] for i in batch], device=device
                ),
                attention_mask=torch.tensor(
                    [[0] * (length - len(rows[i])) + [1] * len(rows[i]) for i in batch], device=device
                ),
                max_new_tokens=most,
                min_new_tokens=most if settings["do_sample"] else 0,
                pad_token_id=padding,
                **{**NEUTRAL, **settings},
            )
            for i, tokens in zip(batch, generated[:, length:].tolist(), strict=True):
                continued[i] = tokens[: num_new[i]]
            bar.update(len(batch))
    return continued


def ngram_entropy(text: str, n: int) -> float:
    """Return H_n = −Σ p log₂ p over the n-grams of the words of `text`, in bits; 0 if it has fewer than `n` words.

    A word is a run of letters and digits, a punctuation mark, or a character of a script that is written unspaced.
    """
    words = _WORD.findall(text)
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())


def fluency(texts: Sequence[str]) -> float:
    """Return GE = 100 · mean over texts of ½(⅔ H₂ + 4⁄3 H₃), with the entropies of `ngram_entropy`.

    Repetition lowers it, and length raises it: Wikipedia in pieces of 100 tokens has about 640. Compare texts of one
    length and language.

    Raises:
        ValueError: If there is no text.
    """
    if not texts:
        raise ValueError("`texts` is empty: give at least one text.")
    weighted = [sum(weight * ngram_entropy(text, n) for n, weight in ENTROPY_WEIGHTS.items()) / 2 for text in texts]
    return 100 * sum(weighted) / len(texts)


def consistency(generated: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """Return RS = 100 · mean over edits of the cosine of the TF-IDF vectors of generated texts and references.

    An edit's texts are joined. The vocabulary and the inverse document frequencies are those of all the references,
    each text a document.

    Args:
        generated: For each edit, texts about its subject by the edited model.
        references: For each edit, texts about what the subject has become: about its new target, for instance.

    Raises:
        ImportError: If scikit-learn is missing.
        ValueError: If there are not as many references as edits, or there is no edit.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise ImportError(
            "`consistency` needs the package scikit-learn: pip install memory-adapters[evaluation]"
        ) from None
    if not generated or len(generated) != len(references):
        raise ValueError(f"`references` has {len(references)} entries for {len(generated)} of `generated`.")
    vectorizer = TfidfVectorizer().fit(dict.fromkeys(text for texts in references for text in texts))
    a, b = (vectorizer.transform([" ".join(texts) for texts in side]) for side in (generated, references))
    return 100 * float(a.multiply(b).sum()) / len(generated)
