"""What the engine reaches on a device: right tokens, throughput, memory, and its rivals."""
