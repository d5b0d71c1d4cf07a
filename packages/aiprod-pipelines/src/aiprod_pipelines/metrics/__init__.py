"""Measures of any clip that need no network and no reference: picture, motion, sound, sync.

They live here, and not with the trainer, because what makes clips (healing, best-of-N) judges them
too. Each is a function of arrays with its unit in its name or docstring; `report.measure` puts all
of them together for a file.
"""
