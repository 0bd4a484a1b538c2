"""Generation: a decoder driven step by step, and the engine that makes rollouts with it."""

from alignkit.rollout.engine import LocalEngine

__all__ = ["LocalEngine"]
