"""The training process: it leases one job, trains it, and hands over the adapter. Not here: the job API (see jobs/)."""
