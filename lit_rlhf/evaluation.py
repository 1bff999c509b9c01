"""Evaluate a model on held-out prompts: completions, what judges say of them, and figures with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lit_rlhf.data.encoding import Encoder
from lit_rlhf.data.lengths import LongRows, room_of_prompts, rows_too_long
from lit_rlhf.errors import InputError
from lit_rlhf.functional import kl_estimate, mean_interval, rate_interval
from lit_rlhf.functional.evaluation import Interval
from lit_rlhf.models.loading import end_tokens, max_positions, vocabulary_size
from lit_rlhf.models.scoring import score
from lit_rlhf.rewards import Judges, RewardFunctions
from lit_rlhf.rollouts.loader import prompt_batch
from lit_rlhf.rollouts.measures import measures
from lit_rlhf.rollouts.sampler import VALIDATION, decode, engine_for, sample_and_score, score_texts
from lit_rlhf.types import PromptBatch, Row, SamplingConfig, ScoredRollout

Judge: TypeAlias = RewardFunctions | None
Record: TypeAlias = Callable[[dict[str, Any]], Any] | None
Metrics: TypeAlias = dict[str, dict[str, float | int | None]]
_RATES = ("accuracy", "pass_at_", "maj_at_", "truncated_fraction", "win_rate", "tie_rate")  # shares, from 0 to 1


@dataclass(frozen=True)
class Completions:
    """Completions of B prompts, G of each, and what was measured of them."""

    prompts: PromptBatch
    rollout: ScoredRollout  # N = B * G rows, prompt by prompt
    texts: list[str]  # N
    measured: dict[str, Tensor]  # [N] or [B], see `measures`
    group_size: int  # G

    def records(self, judges: Judges, **more: Any) -> Iterator[dict[str, Any]]:
        """One dictionary per completion, of plain values, for `samples.jsonl`."""
        G, columns = self.group_size, self.measured
        answers = judges.answers(self.texts)
        for i, text in enumerate(self.texts):
            line = {
                "prompt_index": self.prompts.index[i // G],
                **more,
                "sample": i % G,
                "prompt": self.prompts.columns["prompt"][i // G],
                "completion": text,
                "tokens": int(columns["response_length"][i]),
                "truncated": bool(columns["truncated_fraction"][i]),
                "reward": _plain(columns["reward"][i]),
                "rewards": {name: _plain(columns[f"rewards/{name}"][i]) for name in judges.names},
            }
            if "accuracy" in columns:
                line["answer"] = None if answers[i] is None else str(answers[i])
                line["correct"] = _plain(columns["accuracy"][i])
            yield line


class Candidate:
    """A model whose completions are looked at.

    Args:
        policy: a Hugging Face causal language model; its device is where everything is computed.
        tokenizer: its tokenizer, see `tokenizer_for`.
        judges: what scores the completions.
        sampling: how they are sampled, `group_size` of each prompt.
        seed: decides every sampled token, together with the prompt's place among the rows.
        stage: keeps the random numbers of two candidates apart. Those of validation are the default: what is measured
            here is what validation measures.
    """

    def __init__(
        self,
        policy: nn.Module,
        tokenizer: Any,
        judges: Judges,
        sampling: SamplingConfig,
        *,
        seed: int = 0,
        stage: int = VALIDATION,
    ) -> None:
        self.policy, self.tokenizer, self.judges = policy.eval(), tokenizer, judges
        self.sampling, self.seed, self.stage = sampling, seed, stage
        self.encoder = Encoder(tokenizer, end_tokens(policy, tokenizer), vocabulary_size(policy))
        self.engine = engine_for(policy, tokenizer, sampling.stop)
        self.engine.update_weights(policy, 0)

    @property
    def prompt_limit(self) -> int | None:
        """Most tokens that a prompt may have; None where the model's configuration does not say."""
        limit = max_positions(self.policy)
        return None if limit is None else limit - self.sampling.max_new_tokens

    def fitting(self, rows: Sequence[Row], long_rows: LongRows = "stop") -> tuple[list[Row], int]:
        """The rows that the model can read, encoded, and how many were left out or are cut.

        Args:
            rows: all of them.
            long_rows: what to do with prompts that do not fit, see `RowsDataModule`.
        """
        self.encoder.truncate = long_rows == "truncate"
        self.encoder.prepare(rows)
        long = rows_too_long(rows, room_of_prompts(self), "held-out", long_rows)
        return [row for i, row in enumerate(rows) if i not in long or self.encoder.truncate], len(long)

    def complete(self, rows: Sequence[Row], first: int, ks: Sequence[int] = (), greedy: bool = False) -> Completions:
        """Sample, or decode greedily, and judge; `first` is the place of the first of these rows among all."""
        sampling = replace(self.sampling, temperature=0.0, group_size=1) if greedy else self.sampling
        index = list(range(first, first + len(rows)))
        prompts = prompt_batch(rows, lambda prompt: self.encoder.prompt(prompt, self.prompt_limit), index)
        rollout = sample_and_score(self.engine, self.tokenizer, self.judges, prompts, sampling, self.seed, self.stage)
        texts = decode(self.tokenizer, rollout)
        measured = measures(rollout, self.judges, texts, sampling.group_size, ks)
        return Completions(prompts, rollout, texts, measured, sampling.group_size)


class Figures:
    """Sums by prompt of named quantities, and their means with intervals."""

    def __init__(self) -> None:
        self.totals: dict[str, list[Tensor]] = {}
        self.counts: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor, prompts: int, counts: Tensor | None = None) -> None:
        """Count values of so many prompts, in their order: as many of each prompt, NaN where one does not apply.

        Args:
            name: of the quantity.
            values: `[B * G]`.
            prompts: B.
            counts: `[B * G]`, how many things each value is the sum of; 1 by default.
        """
        values = values.detach().double().view(prompts, -1).cpu()
        weight = torch.ones_like(values) if counts is None else counts.double().view(prompts, -1).cpu()
        known = ~values.isnan()
        self.totals.setdefault(name, []).append(values.nan_to_num(0).sum(1))
        self.counts.setdefault(name, []).append((weight * known).sum(1))

    def metrics(self) -> Metrics:
        """By name: `value`, the 95 % interval `low` to `high`, and how many `prompts` and `samples` it is of.

        What nothing was counted of is left out; an end that is not known is None.
        """
        found: Metrics = {}
        for name, parts in self.totals.items():
            totals, counts = torch.cat(parts), torch.cat(self.counts[name])
            if not (counts > 0).any():
                continue
            interval_of = rate_interval if name.startswith(_RATES) else mean_interval
            interval: Interval = interval_of(totals.tolist(), counts.tolist())
            ends = {end: _plain(x) for end, x in interval._asdict().items()}
            found[name] = {**ends, "prompts": int((counts > 0).sum()), "samples": int(counts.sum())}
        return found


@torch.no_grad()
def kl_to(reference: nn.Module, candidate: Candidate, rollout: ScoredRollout) -> Tensor:
    """KL(policy, reference) of whole completions `[N]`: k3 of each sampled token, summed; nats.

    The mean over samples of the policy is an unbiased estimate, since k3 of a token is one of the KL of its step.
    """
    sampling, now = candidate.sampling, rollout.behavior_logprobs
    if sampling.truncates_distribution:
        now = score(candidate.policy, rollout, temperature=sampling.temperature).logprobs
    reference_logprobs = score(reference, rollout, temperature=sampling.temperature).logprobs
    return kl_estimate(now.double(), reference_logprobs.double(), "k3").sum(1)


def wins(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """How often each completion beats one of the opponent's for the same prompt, `[B, G]`, and how often neither does.

    Each is compared with every one of the other's: the mean is the chance that one of each, drawn independently, wins.
    A tie is half a win. NaN where there is nothing to compare with.

    Args:
        own: `[B, G]` scores; NaN is compared with nothing.
        other: `[B, H]` scores of the opponent.

    >>> wins(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.5]]))
    (tensor([[0.8750, 0.2500]]), tensor([[0.2500, 0.5000]]))
    """
    a, b = own.unsqueeze(2), other.unsqueeze(1)
    known = ~a.isnan() & ~b.isnan()
    ties, better = (((x & known).sum(2) / known.sum(2)) for x in (a == b, a > b))
    return better + ties / 2, ties


def check_same_vocabulary(policy: nn.Module, reference: nn.Module) -> None:
    """Refuse a reference whose token ids mean other things."""
    sizes = vocabulary_size(policy), vocabulary_size(reference)
    if sizes[0] != sizes[1]:
        raise InputError(
            f"reference.path: a KL needs the model's own vocabulary of {sizes[0]} tokens, the reference has {sizes[1]}"
        )


def evaluate_rows(
    candidate: Candidate,
    rows: Sequence[Row],
    *,
    ks: Sequence[int] = (1,),
    batch_size: int = 64,
    greedy: bool = True,
    reference: nn.Module | None = None,
    against: Candidate | None = None,
    judge: Judge = None,
    record: Record = None,
) -> Metrics:
    """Complete every row's prompt and measure; see `Figures.metrics` for what comes back.

    Args:
        candidate: the model.
        rows: with a `prompt` and the columns that the judges read.
        ks: of pass@k and maj@k, at most the candidate's `group_size`.
        batch_size: prompts at a time.
        greedy: decode every prompt greedily, too.
        reference: a model to report the KL to; at a temperature of 0 there is none.
        against: a second model, for the win rate.
        judge: what decides who wins; by default the reward.
        record: called with the dictionary of every completion.
    """
    figures = Figures()
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        if greedy:
            done = candidate.complete(some, first, greedy=True)
            _add(figures, done, "greedy")
            _record(record, done, candidate, model="model", decoding="greedy")
        sampled = candidate.complete(some, first, ks)
        _add(figures, sampled, "sampled")
        _record(record, sampled, candidate, model="model", decoding="sampled")
        if reference is not None and candidate.sampling.temperature > 0:
            kl = kl_to(reference, candidate, sampled.rollout)
            figures.add("kl_per_sequence", kl, len(some))
            figures.add("kl_per_token", kl, len(some), sampled.rollout.lengths)
        if against is not None:
            opponent = against.complete(some, first)
            _record(record, opponent, against, model="against", decoding="sampled")
            _compare(figures, candidate, sampled, against, opponent, judge)
    return figures.metrics()


def _add(figures: Figures, done: Completions, how: str) -> None:
    B, G = len(done.prompts), done.group_size
    for name, values in done.measured.items():
        if name == "accuracy":  # as validation has it: a prompt of which some completions are not judged weighs as much
            values = values.view(B, G).nanmean(1)
        counts = None if len(values) == B * G else torch.full((B,), G)  # figures of prompts are of G completions
        figures.add(name if "_at_" in name else f"{name}_{how}", values if counts is None else values * G, B, counts)


def _compare(
    figures: Figures, candidate: Candidate, own: Completions, against: Candidate, other: Completions, judge: Judge
) -> None:
    scores = []
    for which, done in ((candidate, own), (against, other)):
        by = done.rollout.raw_rewards
        if judge is not None:
            by, _ = score_texts(judge, which.tokenizer, done.prompts, done.rollout, done.group_size)
        scores.append(by.double().view(len(done.prompts), -1))
    won, tied = wins(*scores)
    difference = scores[0].nanmean(1) - scores[1].nanmean(1)
    for name, values in {"win_rate": won, "tie_rate": tied, "score_difference": difference}.items():
        figures.add(name, values, len(own.prompts))


def _record(record: Record, done: Completions, candidate: Candidate, **more: Any) -> None:
    if record is not None:
        for line in done.records(candidate.judges, **more):
            record(line)


def _plain(x: float | Tensor) -> float | None:
    number = float(x)
    return number if number == number else None


def table(metrics: Metrics) -> Iterator[str]:
    """The lines of a table of metrics, one each: name, value, interval."""
    width = max(map(len, metrics), default=0)
    yield f"{'':{width}}  {'value':>8}  95 % interval"
    for name, of in metrics.items():
        ends = "" if of["low"] is None else f"{of['low']:.3f} to {of['high']:.3f}"
        yield f"{name:{width}}  {of['value']:8.3f}  {ends}".rstrip()
