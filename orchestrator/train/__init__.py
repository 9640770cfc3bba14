"""The training loop, its step, optimizer, schedule and state."""
