"""Measures of overfitting, fidelity and alignment: pure functions of predictions and of features.

fisher       latent Fisher divergence: how far the customised model's predictions are from the base model's
wasserstein  distance between two clouds of features
kid          the same, unbiased for few samples
fidelity     CLIP-I, DINO, CLIP-T, PRES, DIV, drift
estimate     a figure with its standard error
best         which moment of a training to keep, and where overfitting begins
"""
