"""Judging a response: no torch, no vLLM.

A recipe's `RewardsConfig` names the components; a `RewardManager` judges groups with them. A plug-in is a function that returns a float,
a `RewardResult` or `Unavailable`; the decorator `reward` notes down what it promises. `as_trl` hands all of it to trl's GRPOTrainer.
"""

from .cache import VerdictCache
from .config import ComponentConfig, RewardConfigError, RewardsConfig
from .manager import RewardManager, RewardUnavailableError
from .plugin import reward
from .result import JudgedRollout, RewardResult, RolloutScore, ScoredGroup, Unavailable, UnjudgedRollout
from .summary import ComponentSummary, ScoreSummary, group_outcomes, summarise
from .trl_adapter import as_trl, as_trl_components
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
    "VerdictCache",
    "WorkerError",
    "as_trl",
    "as_trl_components",
    "group_outcomes",
    "reward",
    "summarise",
]
