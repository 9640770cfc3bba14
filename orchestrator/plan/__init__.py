"""What a run will need, before it starts, and how right that was afterwards."""
