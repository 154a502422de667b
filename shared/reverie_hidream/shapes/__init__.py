"""A synthetic world of coloured shapes with captions, a meter that reads its pictures, a tiny HiDream trained on it.

`python -m reverie_hidream.shapes.train WORK_DIRECTORY CHECKPOINT` makes the checkpoint,
`python -m reverie_hidream.shapes.evaluate CHECKPOINT` measures it.
"""
