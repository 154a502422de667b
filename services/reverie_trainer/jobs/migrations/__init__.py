"""Alembic migrations of the trainer's database; `reverie_trainer.jobs.database` applies them at start."""
