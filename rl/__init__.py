"""Reinforcement learning: SAPO first; GRPO, GSPO and REINFORCE beside it."""
