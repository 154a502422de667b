"""A job's life in the database and its checkpoints in the store, as transactions."""
