"""The loss of every algorithm, term by term, and its gradients: the papers' sums and derivatives as loops."""

import math

import pytest
import torch

from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.models.scoring import Scores
from lit_rlhf.types import SamplingConfig
from tests.algorithms.settings import AGGREGATIONS, ON_POLICY, module_of, rows_for, setting, take_stats
from tests.helpers import VOCABULARY, as_completions, build, plain_logprobs, random_experience

LENGTHS = (3, 7, 0, 5, 2, 6)
L_MAX = 9


@torch.no_grad()
def plain_scores(module, batch):
    """What the models say about each row on its own, without padding, as `[N, T]` tensors."""
    models, found = module.models, {}
    for name in ("logprobs", "entropy", "kl", "values"):
        found[name] = torch.zeros(batch.response_mask.shape, dtype=torch.float64)
    for i, n in enumerate(batch.response_mask.sum(1).tolist()):
        if not n:
            continue
        ids = torch.cat([batch.prompt_ids[i][batch.prompt_mask[i]], batch.response_ids[i, :n]]).unsqueeze(0)
        logits, hidden = (x[0, -n - 1 : -1] for x in (models.policy(ids).logits, hidden_states(models, ids)))
        log_p = logits - logits.exp().sum(-1, keepdim=True).log()
        found["logprobs"][i, :n] = log_p[torch.arange(n), batch.response_ids[i, :n]]
        found["entropy"][i, :n] = -(log_p.exp() * log_p).sum(-1)
        if models.reference is not None:
            log_q = models.reference(ids).logits[0, -n - 1 : -1].log_softmax(-1)
            found["kl"][i, :n] = (log_p.exp() * (log_p - log_q)).sum(-1)
        if models.value_head is not None:
            found["values"][i, :n] = hidden @ models.value_head.weight
    return Scores(**{name: x.requires_grad_() for name, x in found.items()})


def hidden_states(models, ids):
    trunk = models.value_trunk if models.value_trunk is not None else models.policy.base_model
    return trunk(ids).last_hidden_state


# a token's loss and its derivative by the ratio, or by the log-prob where there is none


def clipped(r, A, low, high, dual=math.inf):
    """-min(r A, clip(r) A), at most -c A where A < 0."""
    inside, outside = -r * A, -min(max(r, 1 - low), 1 + high) * A
    if A < 0 and max(inside, outside) > -dual * A:
        return -dual * A, 0.0
    return (inside, -A) if inside >= outside else (outside, 0.0)


def policy_terms(module, batch, i, lp):
    """The policy loss of row i, one per token, and the derivatives of their sum by each log-prob."""
    cells = range(int(batch.response_mask[i].sum()))
    A, old = ([float(x[i, t]) for t in cells] for x in (batch.advantages, batch.old_logprobs))
    logs = [lp[t] - old[t] for t in cells]
    loss, n = module.policy_loss, max(len(cells), 1)
    if loss == "reinforce":
        return [-A[t] * lp[t] for t in cells], [-A[t] for t in cells]
    if loss == "cispo":
        w = [min(max(math.exp(d), module.clip_min), module.clip_max) for d in logs]
        return [-w[t] * A[t] * lp[t] for t in cells], [-w[t] * A[t] for t in cells]
    low, high = (getattr(module, f"clip_ratio_{side}", 0.2) for side in ("low", "high"))
    if loss == "clip":
        pairs = [
            clipped(math.exp(logs[t]), A[t], low, high, getattr(module, "dual_clip", None) or math.inf) for t in cells
        ]
        return [value for value, _ in pairs], [slope * math.exp(logs[t]) for t, (_, slope) in enumerate(pairs)]
    ratio = math.exp(sum(logs) / n if loss.startswith("gspo") else sum(logs))
    pairs = [clipped(ratio, a, low, high) for a in A]
    values = [value for value, _ in pairs]
    if loss == "gspo_token":
        return values, [slope * ratio for _, slope in pairs]
    total = sum(slope for _, slope in pairs) * ratio / (n if loss == "gspo" else 1)
    return values, [total for _ in cells]


def weights_of(name, module, batch, i, lp):
    """clip(pi / pi_b) decay^gap of every token of row i; 1 where nothing is corrected."""
    cells, gap = range(int(batch.response_mask[i].sum())), int(batch.staleness[i])
    of_all, decay = name.startswith("Importance"), 0.9 if name.endswith("sums") else 1.0
    if not of_all and gap == 0:
        return [1.0 for _ in cells]
    now = lp if of_all else [float(batch.old_logprobs[i, t]) for t in cells]
    low, high, decay = (1 / module.clip_ratio, module.clip_ratio, decay) if of_all else (0.5, 2.0, 0.99)
    behavior = batch.behavior_logprobs[i]
    logs = [now[t] - float(behavior[t]) for t in cells] if behavior.ndim else []
    if "by s" in name:
        logs = [sum(logs) if behavior.ndim else sum(now) - float(behavior)] * len(cells)
    return [min(max(math.exp(d), low), high) * decay**gap for d in logs]


def kl_terms(module, batch, i, lp):
    """The estimated KL of row i per token, and its derivatives by the log-probs."""
    out = []
    for t in range(int(batch.response_mask[i].sum())):
        delta, rho = lp[t] - float(batch.ref_logprobs[i, t]), math.exp(lp[t] - float(batch.old_logprobs[i, t]))
        k2, k3 = (delta * delta / 2, delta), (math.exp(-delta) - 1 + delta, 1 - math.exp(-delta))
        value, slope = k2 if module.kl.loss_estimator == "k2" else k3
        out.append((rho * value, rho * (value + slope)) if module.kl.unbiased else (value, slope))
    return [value for value, _ in out], [slope for _, slope in out]


def share_of(mode, batch, i):
    n, rows, tokens = (
        int(batch.response_mask[i].sum()),
        int(batch.response_mask.any(1).sum()),
        int(batch.response_mask.sum()),
    )
    shares = {"token-mean": 1 / tokens, "seq-mean-token-mean": 1 / (rows * max(n, 1)), "seq-mean-token-sum": 1 / rows}
    return {**shares, "seq-mean-token-sum-norm": 1 / rows / L_MAX}[mode]


def value_terms(module, batch, i, values):
    """The value loss of row i per token, and its derivatives."""
    out, eps = [], module.critic.clip or math.inf
    for t in range(int(batch.response_mask[i].sum())):
        old, target, v = float(batch.values[i, t]), float(batch.returns[i, t]), values[t]
        near = min(max(v, old - eps), old + eps)
        plain, held = (v - target) ** 2, (near - target) ** 2
        out.append((max(plain, held) / 2, 0.0 if near != v and held >= plain else v - target))
    return [value for value, _ in out], [slope for _, slope in out]


def conservative_term(module, batch, scores, slopes):
    """c max(0, K - kappa)^2 with K over all tokens; adds its gradient to `slopes`."""
    cells, full = batch.response_mask.nonzero().tolist(), module.needs_exact_kl
    delta = (scores.logprobs - batch.ref_logprobs).tolist()
    k = [float(scores.kl[i, t]) if full else delta[i][t] ** 2 / 2 for i, t in cells]
    c, excess = 2.0, sum(k) / len(k) - 0.02
    assert excess > 1e-3
    for i, t in cells:
        slopes["kl" if full else "logprobs"][i][t] += 2 * c * excess * (1.0 if full else delta[i][t]) / len(k)
    return c * excess**2


def papers_terms(name, module, batch, scores):
    """The named terms, and the gradients by log-probs, entropy, KL and values."""
    N, T = batch.response_mask.shape
    terms, slopes = {}, {x: [[0.0] * T for _ in range(N)] for x in ("logprobs", "entropy", "kl", "values")}
    tokens = int(batch.response_mask.sum())

    def add(term, i, share, values, gradient=(), wrt="logprobs"):
        terms[term] = terms.get(term, 0.0) + sum(s * value for s, value in zip(share, values, strict=True))
        for t, slope in enumerate(gradient):
            slopes[wrt][i][t] += share[t] * slope

    for i in range(N):
        n = int(batch.response_mask[i].sum())
        lp, entropy, kl, values = (getattr(scores, x)[i, :n].tolist() for x in slopes)
        per_token, share = [1 / tokens] * n, share_of(module.loss_agg, batch, i)
        weighed = [share * w for w in weights_of(name, module, batch, i, lp)]
        add("policy_loss", i, weighed, *policy_terms(module, batch, i, lp))
        if module.kl.in_loss and module.kl.loss_estimator == "full":  # no token was sampled: nothing to weigh
            add("kl_loss", i, [0.3 * share] * n, kl, [1.0] * n, "kl")
        elif module.kl.in_loss:
            add("kl_loss", i, [0.3 * s for s in weighed], *kl_terms(module, batch, i, lp))
        if module.entropy_coef:
            add("entropy_loss", i, per_token, [-0.1 * H for H in entropy], [-0.1] * n, "entropy")
        if module.value != "none":
            of_values = [module.critic.coef * s for s in per_token]
            add("value_loss", i, of_values, *value_terms(module, batch, i, values), "values")
    if name.startswith("Conservative"):
        terms["kl_penalty"] = conservative_term(module, batch, scores, slopes)
    return terms, {x: torch.tensor(value, dtype=torch.float64) for x, value in slopes.items()}


def offered(module, scores):
    """The scores that the module asks for."""
    wanted = {"logprobs": True, "entropy": True, "kl": module.exact_kl, "values": module.value != "none"}
    return Scores(**{x: getattr(scores, x) if there else None for x, there in wanted.items()})


SHIFTED = [(name, None) for name in ON_POLICY] + [(name, agg) for name in ("GRPO", "GSPO") for agg in AGGREGATIONS]
SHIFTED += [
    ("PPO", "seq-mean-token-mean"),
    ("ConservativePPO", "seq-mean-token-sum"),
]  # values: over tokens all the same


@pytest.mark.parametrize(("name", "loss_agg"), SHIFTED)
def test_the_loss_and_its_gradient_are_the_papers(name, loss_agg):
    changes = {"loss_agg": loss_agg} if loss_agg else {}
    module = module_of(name, sampling=SamplingConfig(max_new_tokens=L_MAX), **changes)
    batch = rows_for(name, module.models.policy, LENGTHS)
    scores = plain_scores(module, batch)
    expected, slopes = papers_terms(name, module, batch, scores)

    terms = module.compute_loss(offered(module, scores), batch)
    sum(terms.values()).backward()

    assert {term: value.item() for term, value in terms.items()} == pytest.approx(expected, abs=1e-9)
    for x, expected_gradient in slopes.items():
        gradient = getattr(scores, x).grad
        found = torch.zeros_like(expected_gradient) if gradient is None else gradient
        torch.testing.assert_close(found, expected_gradient, atol=1e-9, rtol=1e-7, msg=lambda m, x=x: f"{x}: {m}")
    assert (slopes["logprobs"] != 0).any()

    # and from the models: the padded batch, one forward pass
    take_stats(module)
    assert module.training_step(batch).item() == pytest.approx(sum(expected.values()), abs=1e-9)
    stats = take_stats(module)
    for term, value in expected.items():
        unweighted = value / module.critic.coef if term == "value_loss" else value
        assert stats[f"loss/{term}"] == pytest.approx(unweighted, abs=1e-9)


@pytest.mark.parametrize("name", ["GRPO", "DAPO"])
def test_the_metrics_of_an_update(name):
    module = module_of(name)
    batch = rows_for(name, module.models.policy, LENGTHS)
    logprobs = plain_logprobs(module.models.policy, batch)
    high = {"GRPO": 0.2, "DAPO": 0.28}[name]

    module.training_step(batch)

    stats, ratio = take_stats(module), (logprobs - batch.old_logprobs)[batch.response_mask].exp()
    A = batch.advantages[batch.response_mask]
    clips = [(r < 0.8 and a < 0) or (r > 1 + high and a > 0) for r, a in zip(ratio.tolist(), A.tolist(), strict=True)]
    assert 0 < sum(clips) < len(clips)
    log_ref = (batch.ref_logprobs - logprobs)[batch.response_mask]
    entropy = plain_scores(module, batch).entropy[batch.response_mask]
    expected = {
        "clip_fraction": sum(clips) / len(clips),
        "ratio_max": ratio.max(),
        "ratio_min": ratio.min(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "approx_kl_k1": -ratio.log().mean(),
        "entropy": entropy.mean(),
        "kl_divergence": (log_ref.exp() - log_ref - 1).mean(),
        "advantage_mean": A.mean(),
        "advantage_std": A.std(),
    }
    for metric, value in expected.items():
        assert stats[f"stability/{metric}"] == pytest.approx(float(value), abs=1e-9), metric


@pytest.mark.parametrize("name", ["GSPO", "GSPO-token", "RLOO clipped", "CISPO", "PPO"])
def test_how_much_is_clipped_is_of_the_ratio_that_is_clipped(name):
    module, batch = setting(name)
    log_ratio = torch.where(batch.response_mask, plain_logprobs(module.models.policy, batch) - batch.old_logprobs, 0.0)
    lengths = batch.response_mask.sum(1, keepdim=True)
    by_sequence = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    bounds = {"GSPO": (0.95, 1.08), "GSPO-token": (0.95, 1.08), "CISPO": (0.0, 1.2)}.get(name, (0.8, 1.2))
    ratio = {"G": by_sequence / lengths, "R": by_sequence}.get(name[0], log_ratio).exp()[batch.response_mask]
    A = batch.advantages[batch.response_mask]

    module.training_step(batch)

    below, above = ratio < bounds[0], ratio > bounds[1]
    expected = {
        "clip_fraction_low": below & (A < 0),
        "clip_fraction_high": above & (A > 0),
        "clip_fraction": (below & (A < 0)) | (above & (A > 0)),
        "ratio_out_of_range": below | above,
    }
    stats = take_stats(module)
    assert 0 < expected["clip_fraction"].double().mean() < 1
    for metric, cells in expected.items():
        assert stats[f"stability/{metric}"] == pytest.approx(float(cells.double().mean()), abs=1e-9), metric


def test_the_metrics_of_a_value_function():
    module, batch = setting("PPO")
    values = plain_scores(module, batch).values
    module.training_step(batch)
    outside = ((values - batch.values).abs() > 0.2)[batch.response_mask].double().mean()
    assert 0.1 < float(outside) < 0.9
    assert take_stats(module)["stability/value_clip_fraction"] == pytest.approx(float(outside), abs=1e-9)


def test_the_sft_loss_is_the_mean_negative_log_likelihood_of_the_completions():
    module, batch = build(SFT), as_completions(random_experience(lengths=LENGTHS))
    logprobs = plain_logprobs(module.models.policy, batch)
    expected = -float(logprobs.sum()) / 23
    assert module.training_step(batch).item() == pytest.approx(expected, abs=1e-9)
    assert take_stats(module)["rollout/response_length_max"] == 7


def test_the_sft_loss_of_a_flat_model_is_log_v():
    module, batch = build(SFT), as_completions(random_experience())
    with torch.no_grad():
        module.models.policy.lm_head.weight.zero_()
    assert module.training_step(batch).item() == pytest.approx(math.log(VOCABULARY), abs=1e-12)
