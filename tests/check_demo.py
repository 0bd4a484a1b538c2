"""Fails unless the quickstart's evaluation shows alignment: the interval of the win rate above one half, that of the gain above zero."""

import json
import math
import sys
from pathlib import Path

run = Path(sys.argv[1])
figures = json.loads((run / "compare" / "evaluation.json").read_text())
print(json.dumps({name: value for name, value in figures.items() if isinstance(value, int | float)}, indent=1))
assert figures["ci95_low"] > 0.5, "the win rate's interval is not above 50%"
assert figures["judge_gain_ci95_low"] > 0.0, "the judge's gain is not above zero"
assert math.isfinite(figures["kl_sequence_nats"]), "the KL is not finite"
assert (run / "report.html").stat().st_size > 10_000, "the report is missing or empty"
