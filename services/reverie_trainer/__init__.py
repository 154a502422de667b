"""The trainer: jobs and datasets (`jobs`, no torch), and the process that trains one job (`worker`)."""
