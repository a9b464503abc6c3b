"""The ways out: one file each, every one with deliver(results, peer, ...)."""
