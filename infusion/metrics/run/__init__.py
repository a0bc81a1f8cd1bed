"""Runs the measures.

protocol     the prompts; options: what to measure, how, with which networks; subject: a concept and where it is from
subjects     the published subjects of DreamBooth and CustomConcept101
features     what turns images into features
stages       the steps, each row of which the cache keeps; evaluate: every figure of one concept
"""
