"""Run by Alembic: applies the migrations on the connection that the trainer hands over."""

from alembic import context

from reverie_trainer.jobs.state.models import Base

connection = context.config.attributes["connection"]
# Batch mode is how Alembic alters tables where the database cannot (SQLite); elsewhere it is plain ALTER TABLE.
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
