"""What the node costs, measured beside what else a user would run, in the same run on the same machine."""
