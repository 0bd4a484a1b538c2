"""Models: the causal language model that is aligned, and the scalar model that reward model and critic share."""
