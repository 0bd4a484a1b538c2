"""What must hold of every algorithm, on three tiny architectures: the invariants of the specification, each under its name.

``I-RM`` stands with the reward model's own tests, and the half of ``I-ALL-1`` that is about interrupted runs with those of runs.
"""
