"""One file for each way to run a model, every one with load(manifest, folder, device) and code_digest(manifest)."""
