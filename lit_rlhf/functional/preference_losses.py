"""Losses over pairs of completions, one chosen and one rejected; one value per pair, to be minimised."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def dpo_loss(
    chosen_logratio: Float[Tensor, " N"],
    rejected_logratio: Float[Tensor, " N"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> Float[Tensor, " N"]:
    """Direct preference optimisation (arXiv 2305.18290) and its variants, on u = chosen − rejected log-ratio.

        sigmoid   −(1−ε)·log σ(βu) − ε·log σ(−βu)                  ε > 0: cDPO
        robust    [−(1−ε)·log σ(βu) + ε·log σ(−βu)] / (1−2ε)       arXiv 2403.00409
        hinge     max(0, 1 − βu)                                   SLiC, arXiv 2305.10425
        ipo       (u − 1/(2β))²                                    arXiv 2310.12036

    Args:
        chosen_logratio: `[N]`, Σ_t (lp − lp_ref) over the chosen completion's tokens; for "ipo" usually their mean.
        rejected_logratio: `[N]`, the same of the rejected one.
        beta: β, how strongly the policy is held to the reference.
        label_smoothing: ε in [0, 0.5), the share of flipped labels; "sigmoid" and "robust" only.
        kind: "sigmoid", "hinge", "ipo" or "robust".

    Raises:
        ValueError: an unknown kind, or a `label_smoothing` outside of [0, 0.5) or of a kind without it.

    >>> import torch
    >>> chosen, rejected = torch.tensor([1.0]), torch.tensor([-0.5])
    >>> dpo_loss(chosen, rejected), dpo_loss(chosen, rejected, kind="hinge")
    (tensor([0.6210]), tensor([0.8500]))
    """
    if kind not in ("sigmoid", "hinge", "ipo", "robust"):
        raise ValueError(f"kind must be 'sigmoid', 'hinge', 'ipo' or 'robust', got {kind!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing and kind in ("hinge", "ipo"):
        raise ValueError(f"label_smoothing has no meaning for kind {kind!r}: use 'sigmoid' or 'robust'")
    u = chosen_logratio - rejected_logratio
    if kind == "hinge":
        return F.relu(1 - beta * u)
    if kind == "ipo":
        return (u - 1 / (2 * beta)).square()
    as_labelled, flipped = -F.logsigmoid(beta * u), -F.logsigmoid(-beta * u)
    if kind == "robust":
        return ((1 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * as_labelled + label_smoothing * flipped


def bradley_terry_loss(
    chosen: Float[Tensor, " N"],
    rejected: Float[Tensor, " N"],
    margin: float | Float[Tensor, " N"] = 0.0,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """Negative log-likelihood that the chosen completion wins (Stiennon et al., arXiv 2009.01325).

        ℓ = −log σ( (r_chosen − r_rejected − m) / τ )

    Args:
        chosen: `[N]` rewards of the chosen completions.
        rejected: `[N]` rewards of the rejected ones.
        margin: m, one number or one per pair (Llama 2, arXiv 2307.09288).
        temperature: τ.

    Raises:
        ValueError: a temperature that is not above 0.

    >>> import torch
    >>> bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.0]), margin=1.0)
    tensor([0.3133])
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return -F.logsigmoid((chosen - rejected - margin) / temperature)
