"""Alembic migrations of the trainer's database; `reverie_trainer.jobs.state.database` applies them at start."""
