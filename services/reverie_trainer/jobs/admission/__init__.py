"""Whether a job is accepted, what it selects, and what it would take."""
