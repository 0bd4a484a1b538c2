"""What plugin authors use in their own tests: conformance classes to inherit from, a context over a tiny model, and small fakes."""

from alignkit.testing.conformance import Conformance, DataSourceConformance, RewardSourceConformance
from alignkit.testing.fakes import CountingReward, ListSource, example_samples, make_context
from alignkit.testing.optimizers import OptimizerConformance, example_batch

__all__ = [
    "Conformance",
    "CountingReward",
    "DataSourceConformance",
    "ListSource",
    "OptimizerConformance",
    "RewardSourceConformance",
    "example_batch",
    "example_samples",
    "make_context",
]
