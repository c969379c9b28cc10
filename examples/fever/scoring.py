"""Judge claims by what a model decodes greedily, as in the experiment, and by the answers' probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from examples.fever.data import LABELS
from examples.fever.prompts import ANSWERS
from memory_adapters.base_model.decoder import execution_device, find_decoder
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.tokens import batches_of, pad_rows, shared_length, tokenize
from memory_adapters.evaluation.scores.generation import NEUTRAL

__all__ = ["Judgement", "Metrics", "judge", "measure", "separation"]

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Judgement:
    """Hold a model's answers to one prompt.

    Attributes:
        generated: The label whose answer greedy decoding begins with; None if it begins with none of them.
        likeliest: The label whose answer is likeliest where the answers' tokens part, given what they share.
        log_odds: log P((a)) − log P((b)) there: above 0 if the claim is likelier supported than refuted.
    """

    generated: str | None
    likeliest: str
    log_odds: float


@dataclass(frozen=True)
class Metrics:
    """Hold shares in [0, 1], as scikit-learn defines them over the labels that occur in the truth.

    Attributes:
        accuracy: Right answers ÷ all.
        f1_micro: F1 of all labels' counts together: an answer that is none of the labels costs recall alone.
        f1_macro: Mean of the labels' F1.
        answered: Answers that are one of the labels ÷ all.
    """

    accuracy: float
    f1_micro: float
    f1_macro: float
    answered: float

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)


def measure(truth: Sequence[str], answers: Sequence[str | None]) -> Metrics:
    """Accuracy and F1 of `answers`, in which None is an answer that is none of the labels, and so is wrong.

    Raises:
        ImportError: If scikit-learn is missing.
        ValueError: If there is no answer, or not one for each claim.
    """
    f1_score = _sklearn_metrics().f1_score
    if not truth or len(truth) != len(answers):
        raise ValueError(f"`answers` has {len(answers)} entries for {len(truth)} claims: give one for each.")
    given = ["none" if answer is None else answer for answer in answers]
    labels = [label for label in LABELS if label in truth]
    micro, macro = (
        float(f1_score(truth, given, labels=labels, average=average, zero_division=0)) for average in ("micro", "macro")
    )
    right = sum(a == b for a, b in zip(truth, answers, strict=True))
    return Metrics(right / len(truth), micro, macro, sum(answer is not None for answer in answers) / len(truth))


def separation(truth: Sequence[str], log_odds: Sequence[float]) -> float | None:
    """Area under the ROC curve of `log_odds` for supported against refuted claims: 1 if every supported claim has
    higher odds than every refuted one, 0.5 by chance. Unlike accuracy it does not depend on which answer a model
    prefers. None without claims of both labels.

    Raises:
        ImportError: If scikit-learn is missing.
    """
    metrics = _sklearn_metrics()
    pairs = [(label == LABELS[0], odds) for label, odds in zip(truth, log_odds, strict=True) if label in LABELS[:2]]
    if len({supported for supported, _ in pairs}) < 2:
        return None
    return float(metrics.roc_auc_score(*zip(*pairs, strict=True)))


def _sklearn_metrics() -> Any:
    try:
        import sklearn.metrics
    except ImportError:
        raise ImportError("Scores need the package scikit-learn: pip install memory-adapters[evaluation]") from None
    return sklearn.metrics


@torch.no_grad()
def judge(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> list[Judgement]:
    """Return the model's answers to prompts that end in `A:`.

    Args:
        model: A causal LM, with what is to be judged active.
        tokenizer: Its tokenizer.
        prompts: What it is queries.
        batch_tokens: Most tokens a batch, with padding.
        progress: Show a bar.

    Raises:
        ValueError: If the tokenizer makes the same tokens of two answers.
    """
    queries = [_Query.of(tokenizer, prompt) for prompt in prompts]
    found: list[Judgement | None] = [None] * len(prompts)
    with evaluating(model), tqdm(total=len(prompts), desc="judging", unit="claim", disable=not progress) as bar:
        for batch in batches_of([one.prompt for one in queries], batch_tokens):
            rows = [queries[i] for i in batch]
            tokens, logits = _decode(model, tokenizer, [row.prompt for row in rows], max(row.length for row in rows))
            parted = [_at_parting(row, ids, steps) for row, ids, steps in zip(rows, tokens, logits, strict=True)]
            missing = [row.prompt + row.shared for row, scores in zip(rows, parted, strict=True) if scores is None]
            others = _next(model, missing)
            for i, row, ids, scores in zip(batch, rows, tokens, parted, strict=True):
                if scores is None:
                    scores = others.pop(0)
                said = tokenizer.decode(ids, skip_special_tokens=True).strip()
                generated = next((label for label, answer in ANSWERS.items() if said.startswith(answer)), None)
                own = scores[row.parting]
                found[i] = Judgement(generated, LABELS[int(own.argmax())], float(own[0] - own[1]))
            bar.update(len(batch))
    return [one for one in found if one is not None]


@dataclass(frozen=True)
class _Query:
    """Store a prompt's tokens, those that all answers begin with behind it, and each answer's next token."""

    prompt: list[int]
    shared: list[int]
    parting: list[int]
    length: int

    @classmethod
    def of(cls, tokenizer: Any, prompt: str) -> _Query:
        wholes = [tokenize(tokenizer, f"{prompt} {answer}") for answer in ANSWERS.values()]
        own = tokenize(tokenizer, prompt)
        start = min(shared_length(own, whole) for whole in wholes)
        common = min(shared_length(wholes[0], whole) for whole in wholes[1:])
        parting = [whole[common] if len(whole) > common else -1 for whole in wholes]
        if common < start or -1 in parting or len(set(parting)) < len(parting):
            raise ValueError(f"`tokenizer` makes {wholes} of the answers, which do not differ at one token.")
        return cls(own[:start], wholes[0][start:common], parting, max(map(len, wholes)) - start)


def _at_parting(row: _Query, ids: Sequence[int], steps: Tensor) -> Tensor | None:
    """Logits (vocabulary) where the answers part, if greedy decoding went there."""
    return steps[len(row.shared)] if list(ids[: len(row.shared)]) == row.shared else None


def _decode(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], length: int
) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy tokens of each row, and the logits (tokens, vocabulary) that they were chosen by."""
    padding = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    longest = max(map(len, rows))
    device = execution_device(find_decoder(model).embeddings)
    output = model.generate(
        input_ids=torch.tensor([[padding] * (longest - len(row)) + [*row] for row in rows], device=device),
        attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device),
        max_new_tokens=length,
        min_new_tokens=length,
        pad_token_id=padding,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **{name: value for name, value in NEUTRAL.items() if name not in ("temperature", "top_p", "typical_p")},
    )
    return output.sequences[:, longest:].tolist(), list(torch.stack(output.logits, 1).float().cpu())


def _next(model: Any, rows: Sequence[list[int]]) -> list[Tensor]:
    """Logits (vocabulary) of the token after each row."""
    if not rows:
        return []
    inputs = pad_rows(rows, execution_device(find_decoder(model).embeddings))
    logits = model(**inputs, use_cache=False).logits
    return [logits[i, len(row) - 1].float().cpu() for i, row in enumerate(rows)]
