"""The inference server: one backbone in memory, every fine-tune as a delta on top of it."""
