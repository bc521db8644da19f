"""Compute the units of a run: the plan, what computes a unit, and where."""
