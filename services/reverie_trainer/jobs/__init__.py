"""The control plane of training: the job and dataset API, preparation, the reconciler and the launcher. No torch."""
