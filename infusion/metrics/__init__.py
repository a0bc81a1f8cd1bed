"""Measures of overfitting, fidelity and alignment: what is measured, how it is run, and the report."""
