"""Measures of overfitting, fidelity and alignment: pure functions of predictions and of features, and what calls them.

fisher       latent Fisher divergence: how far the customised model's predictions are from the base model's
wasserstein  distance between two clouds of features
fidelity     CLIP-I, DINO, CLIP-T, PRES, DIV, drift
features     what turns images into features
estimate     a figure with its standard error

protocol     the prompts; options: what to measure, how, with which networks; subject: a concept and where it is from
stages       the steps, each row of which the cache keeps; evaluate: every figure of one concept
table, output, page, rows, charts, gallery, words: results as JSON, CSV, plots and a report
"""
