"""What a run needs and leaves: folders, checkpoints, logs, random states, the device."""
