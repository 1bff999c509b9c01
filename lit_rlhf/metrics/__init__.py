"""torchmetrics over `functional`: float64 sums, exact however batches and ranks are split."""

from lit_rlhf.metrics.advantages import GeneralizedAdvantageEstimation, GroupNormalization
from lit_rlhf.metrics.histogram import Histogram
from lit_rlhf.metrics.masked_stats import Cells, MaskedStats
from lit_rlhf.metrics.preferences import PreferenceAccuracy, RewardMargin
from lit_rlhf.metrics.rollouts import LengthStatistics, RewardStatistics
from lit_rlhf.metrics.stability import (
    ApproxKL,
    ClipFraction,
    ExplainedVariance,
    ImportanceRatio,
    KLDivergence,
    PolicyEntropy,
)

__all__ = [
    "ApproxKL",
    "Cells",
    "ClipFraction",
    "ExplainedVariance",
    "GeneralizedAdvantageEstimation",
    "GroupNormalization",
    "Histogram",
    "ImportanceRatio",
    "KLDivergence",
    "LengthStatistics",
    "MaskedStats",
    "PolicyEntropy",
    "PreferenceAccuracy",
    "RewardMargin",
    "RewardStatistics",
]
