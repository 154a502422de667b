"""One training step of HiDream: the batch, the objective, roll-outs, the step and the evaluation loss (spec 2, 3, 9).

Nothing here knows about jobs, stores or services; torch, diffusers, lycoris and optimum.quanto are enough to run it.
"""
