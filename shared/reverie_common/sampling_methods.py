"""Names of sampling methods, for those that check a request without torch; `reverie_hidream.sampling` makes them."""

SCHEDULERS = ("unipc", "euler", "flash")
"""Methods that can be asked for by name besides the checkpoint's own (spec 7.2)."""
