"""Judging a response: no torch, no vLLM.

A recipe's `RewardsConfig` names the components; a `RewardManager` judges groups with them. A plug-in returns a float, a
`RewardResult` or `Unavailable`.
"""

from .config import ComponentConfig, RewardConfigError, RewardsConfig
from .manager import RewardManager, RewardUnavailableError
from .result import JudgedRollout, RewardResult, RolloutScore, ScoredGroup, Unavailable, UnjudgedRollout
from .summary import ComponentSummary, ScoreSummary, group_outcomes, summarise
from .worker import WorkerError

__all__ = [
    "ComponentConfig",
    "ComponentSummary",
    "JudgedRollout",
    "RewardConfigError",
    "RewardManager",
    "RewardResult",
    "RewardUnavailableError",
    "RewardsConfig",
    "RolloutScore",
    "ScoreSummary",
    "ScoredGroup",
    "Unavailable",
    "UnjudgedRollout",
    "WorkerError",
    "group_outcomes",
    "summarise",
]
