"""The trainer: the job API in `jobs`, the training process in `worker`."""
