"""Keys and values as tensors, without a model: cache, rotary positions, attention, positioning."""
