"""Score edits: on their prompts, on paraphrases, and on the neighbourhood that must not change.

P(text | prompt) is the mean log-probability per token, as the field normalises it. A share is the mean over records of
the mean over a record's prompts, so that a record with many paraphrases counts no more than one with few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import execution_device, find_decoder
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.partial_forward import logits_at
from memory_adapters.base_model.tokens import batches_of, continued_prompt, pad_rows
from memory_adapters.evaluation.records import EditRecord, Question
from memory_adapters.items import continuation_of
from memory_adapters.peft_layers.virtual_tokens import num_virtual_tokens

__all__ = ["EditScores", "KindScores", "score_continuations", "score_edits", "score_kinds", "score_records"]

BATCH_TOKENS = 1024
Query = tuple[str, str]


@dataclass(frozen=True)
class EditScores:
    """Store the scores of edits: shares in [0, 1]; None where the records have nothing to judge by.

    Attributes:
        efficacy: P(new) > P(true) on the prompt (ES).
        paraphrase: The same on the paraphrases (PS).
        neighbourhood: P(true answer) > P(new) on the neighbours (NS).
        score: Harmonic mean of the three (S).
        exact_match: Every token of the new target is the model's first choice on the prompt: greedy decoding gives it.
        paraphrase_exact_match: The same on the paraphrases.
        neighbourhood_exact_match: The same of the true answers on the neighbours.
        token_accuracy: Share of the new target's tokens that are the model's first choice, given the prompt and the
            target's tokens before (efficacy of zsRE).
        paraphrase_token_accuracy: The same on the paraphrases (generalisation of zsRE).
        neighbourhood_token_accuracy: The same of the true answers on the neighbours (specificity of zsRE).
        token_score: Harmonic mean of these three (S of zsRE).
        portability_exact_match: Exact match of the answers that follow from the edits.
        portability_token_accuracy: Token accuracy of these answers.
    """

    efficacy: float | None
    paraphrase: float | None
    neighbourhood: float | None
    score: float | None = field(init=False)
    exact_match: float
    paraphrase_exact_match: float | None
    neighbourhood_exact_match: float | None
    token_accuracy: float
    paraphrase_token_accuracy: float | None
    neighbourhood_token_accuracy: float | None
    token_score: float | None = field(init=False)
    portability_exact_match: float | None = None
    portability_token_accuracy: float | None = None

    def __post_init__(self) -> None:
        comparisons = (self.efficacy, self.paraphrase, self.neighbourhood)
        tokens = (self.token_accuracy, self.paraphrase_token_accuracy, self.neighbourhood_token_accuracy)
        object.__setattr__(self, "score", _harmonic_mean(comparisons))
        object.__setattr__(self, "token_score", _harmonic_mean(tokens))

    def to_dict(self) -> dict[str, float | None]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def mean(cls, scores: Sequence[EditScores]) -> EditScores:
        """Average each share over those of `scores` that have it; the harmonic means are of the averages."""
        names = [f.name for f in fields(cls) if f.init]
        return cls(**{name: mean_of(getattr(one, name) for one in scores) for name in names})  # type: ignore[arg-type]


@dataclass(frozen=True)
class KindScores:
    """Store the scores of one kind of neighbours or of questions about what follows, such as KnowEdit names them.

    Attributes:
        group: `"neighbours"` or `"portability"`.
        kind: The kind.
        number: Records that have questions of it.
        neighbourhood: P(true answer) > P(new), of neighbours.
        exact_match: Every token of a right answer is the model's first choice.
        token_accuracy: Share of the right answer's tokens that are the model's first choice.
    """

    group: str
    kind: str
    number: int
    neighbourhood: float | None
    exact_match: float
    token_accuracy: float


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _harmonic_mean(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return len(known) / sum(1 / part for part in known) if all(known) else 0.0


def score_edits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[EditRecord]
) -> EditScores:
    """Score `records` on the model as it stands.

    Raises:
        ValueError: If there is no record.
    """
    return EditScores.mean(score_records(model, tokenizer, records))


def score_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> list[EditScores]:
    """Score each of `records` by itself, all in the same batches.

    Args:
        model: A causal LM, with what is to be judged active.
        tokenizer: Its tokenizer.
        records: What to score.
        batch_tokens: Most tokens a forward pass, with padding.
        progress: Show a bar.

    Returns:
        For each record the shares over its own prompts.

    Raises:
        ValueError: If there is no record.
    """
    return score_kinds(model, tokenizer, records, batch_tokens=batch_tokens, progress=progress)[0]


def score_kinds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> tuple[list[EditScores], list[KindScores]]:
    """Return what `score_records` returns, and the scores of each kind of question over all records."""
    if not records:
        raise ValueError("`records` is empty: give at least one EditRecord.")
    queries = [query for record in records for query in _queries(record)]
    scored = _score(model, tokenizer, queries, batch_tokens=batch_tokens, progress=progress)
    kinds: dict[tuple[str, str], list[_Answered]] = {}
    for record in records:
        for group in ("neighbours", "portability"):
            questions = _questions(record, group)
            for kind in dict.fromkeys(question.kind for question in questions if question.kind):
                own = [question for question in questions if question.kind == kind]
                kinds.setdefault((group, kind), []).append(_answered(record, own, scored))
    return [_record_scores(record, scored) for record in records], [
        KindScores(
            group,
            kind,
            len(found),
            mean_of(one.preferred for one in found) if group == "neighbours" else None,
            mean_of(one.exact for one in found) or 0.0,
            mean_of(one.token_accuracy for one in found) or 0.0,
        )
        for (group, kind), found in kinds.items()
    ]


def _questions(record: EditRecord, group: str) -> list[Question]:
    return [Question(*question) for question in getattr(record, group)]


def _told(record: EditRecord, prompt: str, target: str) -> Query:
    """Return a prompt of the record's fact with a continuation that is joined as the fact says."""
    separator = record.fact.separator
    return prompt, continuation_of(prompt, target) if separator is None else separator + target


def _asked(prompt: str, answer: str) -> Query:
    return prompt, continuation_of(prompt, answer)


def _queries(record: EditRecord) -> Iterator[Query]:
    new, true = record.fact.target, record.true_target
    for prompt in (record.fact.prompt, *record.paraphrases):
        yield _told(record, prompt, new)
        if true is not None:
            yield _told(record, prompt, true)
    for group in ("neighbours", "portability"):
        for question in _questions(record, group):
            for answer in (question.answer, *question.alternatives):
                yield _asked(question.prompt, answer)
            if group == "neighbours":
                yield _asked(question.prompt, new)


class _Answered(NamedTuple):
    """Store shares over some questions of one record; each counts with the best of its right answers."""

    preferred: float | None
    exact: float | None
    token_accuracy: float | None


def _answered(record: EditRecord, questions: Sequence[Question], scored: dict[Query, _Score]) -> _Answered:
    answers = [[scored[_asked(q.prompt, answer)] for answer in (q.answer, *q.alternatives)] for q in questions]
    best = [max(score.log_prob for score in scores) for scores in answers]
    news = [scored.get(_asked(q.prompt, record.fact.target)) for q in questions]
    right = [max(score.token_accuracy for score in scores) for scores in answers]
    return _Answered(
        mean_of(None if new is None else own > new.log_prob for own, new in zip(best, news, strict=True)),
        mean_of(share == 1 for share in right),
        mean_of(right),
    )


def _record_scores(record: EditRecord, scored: dict[Query, _Score]) -> EditScores:
    new, true = record.fact.target, record.true_target

    def preferred(prompts: Sequence[str]) -> float | None:
        if true is None:
            return None
        pairs = [(scored[_told(record, p, new)], scored[_told(record, p, true)]) for p in prompts]
        return mean_of(one.log_prob > other.log_prob for one, other in pairs)

    written = scored[_told(record, record.fact.prompt, new)]
    paraphrases = [scored[_told(record, prompt, new)] for prompt in record.paraphrases]
    neighbours = _answered(record, _questions(record, "neighbours"), scored)
    portability = _answered(record, _questions(record, "portability"), scored)
    return EditScores(
        efficacy=preferred([record.fact.prompt]),
        paraphrase=preferred(record.paraphrases),
        neighbourhood=neighbours.preferred,
        exact_match=float(written.exact),
        paraphrase_exact_match=mean_of(score.exact for score in paraphrases),
        neighbourhood_exact_match=neighbours.exact,
        token_accuracy=written.token_accuracy,
        paraphrase_token_accuracy=mean_of(score.token_accuracy for score in paraphrases),
        neighbourhood_token_accuracy=neighbours.token_accuracy,
        portability_exact_match=portability.exact,
        portability_token_accuracy=portability.token_accuracy,
    )


def score_continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, queries: Sequence[Query]
) -> list[tuple[float, bool]]:
    """Return each (prompt, continuation)'s mean log-probability per token, and whether greedy decoding gives it.

    The continuation is joined to its prompt with a space where one is needed. Both are tokenised together, and the
    tokens behind the prompt are scored.
    """
    asked = [_asked(*query) for query in queries]
    scored = _score(model, tokenizer, asked)
    return [(scored[query].log_prob, scored[query].exact) for query in asked]


class _Score(NamedTuple):
    """Store a continuation's mean log-probability per token in nats, and the share of tokens that are first choices."""

    log_prob: float
    token_accuracy: float

    @property
    def exact(self) -> bool:
        return self.token_accuracy == 1


@torch.no_grad()
def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Iterable[Query],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> dict[Query, _Score]:
    """Score each continuation once, and those of one prompt in one row where their tokens begin alike.

    A row is what precedes the last token of a continuation. The new and the true target of a prompt are mostly one
    token each: both are then predicted by the prompt alone.
    """
    asked = list(dict.fromkeys(queries))
    rows_of = [continued_prompt(tokenizer, prompt, end) for prompt, end in asked]
    texts, first = [tuple(ids) for ids, _ in rows_of], [start for _, start in rows_of]
    count = torch.tensor([len(ids) - start for ids, start in zip(texts, first, strict=True)])
    if (count < 1).any():
        prompt, end = asked[int(count.argmin())]
        raise ValueError(
            f"`target={end.strip()!r}` adds no token to `prompt={prompt!r}`: the tokenizer drops it, reword it."
        )
    rows: list[tuple[int, ...]] = []
    read_off: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: texts[i][:-1], reverse=True):
        ids = texts[i][:-1]
        if not rows or rows[-1][: len(ids)] != ids:  # in this order, what extends `ids` comes right before it
            rows.append(ids)
            read_off.append([])
        read_off[-1].append(i)
    decoder = find_decoder(model)
    device = execution_device(decoder.embeddings)
    log_prob, right = (torch.zeros(len(texts), dtype=torch.float32) for _ in range(2))
    with evaluating(model), tqdm(total=len(rows), desc="scoring", unit="row", disable=not progress) as bar:
        for batch in batches_of(rows, batch_tokens, virtual_tokens=num_virtual_tokens(model)):
            inputs = pad_rows([rows[row] for row in batch], device)
            cells = torch.tensor(
                [
                    (i, line, place - 1, texts[i][place])
                    for line, row in enumerate(batch)
                    for i in read_off[row]
                    for place in range(first[i], len(texts[i]))
                ]
            )
            owner, line_of, place_of, token = cells.to(device).unbind(1)
            wanted = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
            wanted[line_of, place_of] = True
            at = (wanted.flatten().cumsum(0) - 1).view_as(wanted)[line_of, place_of]
            with logits_at(decoder, wanted):
                # With a cache, slots that a memory puts before every prompt are not computed again in every pass.
                logits = model(**inputs, use_cache=True).logits[0].float()
            at, token = at.to(logits.device), token.to(logits.device)
            log_prob.index_add_(0, owner.cpu(), (logits[at, token] - logits.logsumexp(-1)[at]).cpu())
            right.index_add_(0, owner.cpu(), (logits.argmax(-1)[at] == token).float().cpu())
            bar.update(len(batch))
    return dict(zip(asked, map(_Score, (log_prob / count).tolist(), (right / count).tolist()), strict=True))
