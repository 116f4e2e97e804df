"""Advantages of the rollouts of one group. Plain floats: no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal


def has_signal(rewards: Sequence[float]) -> bool:
    """Returns whether the rewards of a group differ, exactly compared.

    A group whose rollouts were all judged alike says nothing about which of them was better; the caller counts such groups.
    """
    return any(reward != rewards[0] for reward in rewards[1:])


def group_advantages(rewards: Sequence[float], *, scale: Literal["std", "none"] = "std", eps: float = 1e-4) -> tuple[float, ...]:
    """Returns the advantage of each rollout against its group.

    `scale="std"`: A_i = (R_i - mean(R)) / (std(R) + eps), std unbiased (divided by G - 1): arXiv:2511.20347 section 2. The paper
    states neither eps nor the kind of std; both are the common choice of the open implementations.
    `scale="none"`: A_i = R_i - mean(R), which does not push harder on groups that are nearly all right or nearly all wrong.

    `rewards` are those of the judged rollouts only, so G may be below the planned group size. Equal rewards give exactly 0.0.
    Raises `ValueError` for fewer than two rewards (the caller drops such a group), a reward that is not finite, rewards too large
    to take a mean of, an unknown `scale` and an `eps` that is not above 0.

    Example: rewards (1.0, 0.0, 0.0, 1.0) have mean 0.5 and std 0.57735, so the advantages are +-0.86588.
    """
    if len(rewards) < 2:
        raise ValueError(f"{len(rewards)} judged rollouts in the group: advantages compare at least 2; drop the group")
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(
                f"rewards[{index}] = {reward!r}: a reward must be finite; a response that cannot be judged is Unavailable, not a number"
            )
    if scale not in ("std", "none"):
        raise ValueError(f"scale = {scale!r}: must be 'std' or 'none'")
    if not eps > 0 or math.isinf(eps):
        raise ValueError(f"eps = {eps!r}: must be finite and above 0, it is added to the std of the rewards")
    # The rounded mean of equal rewards need not equal them (three times 0.1 is not 0.3), so this case never reaches the arithmetic.
    if not has_signal(rewards):
        return (0.0,) * len(rewards)
    try:
        mean = math.fsum(rewards) / len(rewards)
    except OverflowError as error:
        raise ValueError(
            f"rewards up to {max(map(abs, rewards)):.3g} overflow when summed: scale them to the range of their reward"
        ) from error
    centred = tuple(reward - mean for reward in rewards)
    if scale == "none":
        return centred
    std = math.hypot(*centred) / math.sqrt(len(rewards) - 1)
    return tuple(deviation / (std + eps) for deviation in centred)
