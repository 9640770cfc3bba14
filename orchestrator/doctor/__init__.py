"""Is this machine, this storage and this recipe fit for a run: checks before the hours are spent."""
