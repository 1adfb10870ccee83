"""Sub-commands of `kvstore` that need more than a few lines; each adds its flags and runs itself."""
