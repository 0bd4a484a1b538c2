"""Tensor maths, torch only: every formula of the algorithms, as pure functions."""
